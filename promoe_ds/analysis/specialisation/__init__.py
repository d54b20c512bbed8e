"""What the experts of a trained model specialise in, from its weights and a batch of data."""

from promoe_ds.analysis.specialisation.collect import Batch, Observations, observe
from promoe_ds.analysis.specialisation.measures import Information, inter_intra_ratio, mutual_information, subspace_similarity

__all__ = ["Batch", "Information", "Observations", "inter_intra_ratio", "mutual_information", "observe", "subspace_similarity"]
