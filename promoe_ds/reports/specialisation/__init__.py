"""What the experts of a trained model specialise in, from its weights and a batch of data."""
