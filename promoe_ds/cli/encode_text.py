"""Encode the captions of packed latents: one process, or many under torchrun or deepspeed.

    promoe-encode-text --latents latents --images pictures --captions .txt \\
        --text-encoder google/t5-v1_1-xl --text-dtype bfloat16
    promoe-encode-text --latents latents --images pictures --captions caption

A caption is a line of the .txt file beside each image or in its sample of a tar, or the column's
cell in parquet, in metadata.jsonl or metadata.csv, whose column file_name names the images, or the
key's value in a tar's .json. The same command resumes after an interruption, on any number of
processes. `--set data.path=latents` trains on it.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from promoe_ds.cli.entry import command, joined_processes
from promoe_ds.cli.options import Parser, number
from promoe_ds.logs import get_logger


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(__doc__, "promoe-encode-text")
    parser.add_argument(
        "--latents", type=Path, required=True, metavar="DIR", help="packed latents of the images"
    )
    parser.add_argument(
        "--images",
        type=Path,
        required=True,
        metavar="PATH",
        help="what they were encoded from, as promoe-encode takes it",
    )
    parser.add_argument(
        "--split",
        default="train",
        choices=["train", "val", "test"],
        help="where PATH holds these folders, or files that are called so",
    )
    add_captions(parser, required=True)
    parser.add_process()
    return parser.parse_args(arguments)


def add_captions(parser: Parser, *, required: bool) -> None:
    """Add what says which captions are encoded, and how."""
    add = parser.add_argument
    add(
        "--captions",
        required=required,
        metavar="COLUMN|.txt",
        help=(
            "column of parquet, or of metadata.jsonl or metadata.csv in the tree, or key of a tar's"
            " .json; or the .txt file beside an image"
        ),
    )
    add(
        "--text-encoder",
        default="all-minilm-l6-v2",
        metavar="DIR_OR_ID",
        help="transformers text encoder: folder, hub id, or all-minilm-l6-v2, from PyPI",
    )
    add("--text-length", type=number(ge=2), help="tokens that longer captions are cut to")
    add(
        "--text-dtype",
        default="float32",
        choices=["float32", "bfloat16"],
        help="of the text encoder's computation; bfloat16 is stored",
    )
    add(
        "--max-uncaptioned",
        type=number(ge=0),
        default=0,
        help="images without a caption that are named and get the empty text",
    )


def main(arguments: list[str]) -> None:
    """Arguments to request to packed texts."""
    options = parse_arguments(arguments)
    from promoe_ds.data.buckets.dataset import latent_folders
    from promoe_ds.data.sources.files import fetch_from_hub

    with joined_processes(options.device) as team:
        images = team.main_first(lambda: fetch_from_hub(options.images, options.split))
        encode_captions(options, images, latent_folders(options.latents), team)


def encode_captions(
    options: argparse.Namespace, images: Path, folders: Sequence[Path], team: Any
) -> None:
    """Encode the captions of images beside their latents, as the options of `add_captions` say."""
    from promoe_ds.data.text.encode import TextRequest, encode_texts, load_encoder

    request = TextRequest(
        images=images,
        out=folders[0],
        captions=options.captions,
        text_encoder=options.text_encoder,
        split=options.split,
        text_length=options.text_length,
        text_dtype=options.text_dtype,
        max_uncaptioned=options.max_uncaptioned,
    )
    encoder = load_encoder(request, team)
    for folder in folders:
        index = encode_texts(replace(request, out=folder), team, encoder)
        get_logger("encode").info(
            "%s: %d captions, %d tokens, the longest of %d, %d cut, %d images without one; by %s,"
            " for --set model.text_width=%d model.text_pooled_width=%d model.text_length=%d",
            folder,
            index.counts.captions - index.counts.blank,
            index.counts.tokens,
            index.counts.longest,
            index.counts.truncated,
            index.counts.blank,
            index.encoder.name,
            index.encoder.width,
            index.encoder.pooled_width,
            max(index.counts.longest, 2),
        )


run = command(main)

if __name__ == "__main__":
    run()
