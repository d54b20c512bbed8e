"""Encode images into packed latents, plain and mirrored: one process, or many under
torchrun or deepspeed.

    promoe-encode --images pictures --out latents --vae stabilityai/sd-vae-ft-mse --captions .txt
    promoe-encode --images 'imagenet/train-*.parquet' --out latents --vae stabilityai/sd-vae-ft-mse
    promoe-encode --from-latents npz_folder --vae-name stabilityai/sd-vae-ft-mse --out latents

The same command resumes after an interruption, on any number of processes. --from-latents (or
--from-npz) packs the cache of the published code (`.latent.npz`) or of DiffMoE, and latents in
parquet or .pt files: docs/reference/inputs.md lists what is read. The folder's format is
in docs/guides/imagenet.md; `--set data.path=latents` trains on it.
"""

import argparse
from dataclasses import fields
from pathlib import Path

from promoe_ds.cli.encode_text import add_captions, encode_captions
from promoe_ds.cli.entry import command, joined_processes
from promoe_ds.cli.options import Parser, listed, number, size
from promoe_ds.logs import get_logger


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(__doc__, "promoe-encode")
    _add_paths(parser)
    _add_images(parser)
    _add_work(parser)
    add_captions(parser, required=False)
    parser.add_process()
    options = parser.parse_args(arguments)
    _check(parser, options)
    return options


def _add_paths(parser: Parser) -> None:
    """Add what is done, and where to."""
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument(
        "--images",
        type=Path,
        metavar="PATH",
        help="images: a tree of class folders, parquet files, tars, or OWNER/NAME on the hub",
    )
    task.add_argument(
        "--from-latents",
        "--from-npz",
        type=Path,
        metavar="PATH",
        help="latents that are encoded already: a tree of .npz files, parquet, .pt",
    )
    task.add_argument(
        "--verify", type=Path, metavar="DIR", help="only read finished latents and check every byte"
    )
    task.add_argument(
        "--measure",
        type=Path,
        metavar="DIR",
        help="only measure finished latents of earlier versions",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write")


def _add_images(parser: Parser) -> None:
    """Add what is encoded, and by what."""
    add = parser.add_argument
    add("--vae", metavar="DIR_OR_ID", help="diffusers autoencoder: folder or hub id")
    add(
        "--vae-name",
        metavar="NAME",
        help="what the index calls it, if not by --vae: recipes name it in data.vae",
    )
    add(
        "--split",
        default="train",
        choices=["train", "val", "test"],
        help="which of these PATH holds",
    )
    add(
        "--image-column",
        metavar="NAME",
        help="column of the images; in tars their extension",
    )
    add(
        "--label-column",
        metavar="NAME",
        help="column of the labels; in tars extension or json key; '': no labels",
    )
    add(
        "--image-size",
        type=size,
        default=256,
        metavar="PIXELS",
        help="side after the crop, or HxW, e.g. 224x288",
    )
    add(
        "--buckets",
        type=listed(size),
        metavar="HxW,HxW,...",
        help="several sizes, each a folder: images go to the nearest aspect ratio",
    )
    add(
        "--flip",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also encode the mirrored image",
    )


def _add_work(parser: Parser) -> None:
    """Add how it is computed and stored."""
    add = parser.add_argument
    add(
        "--dtype",
        default="float32",
        choices=["float32", "float16", "bfloat16"],
        help="of what is stored",
    )
    add(
        "--vae-dtype", default="float32", choices=["float32", "bfloat16"], help="of the computation"
    )
    add("--batch-size", type=number(ge=1), default=32, help="images a process encodes at once")
    add("--shard-size", type=number(ge=1), default=4096, help="images a file")
    add("--workers", type=number(ge=1), default=8, help="threads a process that decode images")
    add(
        "--max-corrupt",
        type=number(ge=0),
        default=0,
        help="unreadable images that are named and skipped",
    )


def _check(parser: Parser, options: argparse.Namespace) -> None:
    """End with what does not go together."""
    is_finished = options.verify or options.measure
    parser.require(is_finished or options.out, "--out is needed: the folder to write")
    parser.require(options.vae or not options.images, "--images needs --vae")
    if is_finished or options.captions is None:
        texts = "captions", "text_encoder", "text_length", "text_dtype", "max_uncaptioned"
        why = "with finished latents" if is_finished else "without --captions"
        parser.without_effect(options, *texts, reason=why)
    if options.buckets is not None:
        distinct = len(set(options.buckets)) == len(options.buckets)
        parser.require(distinct, "--buckets names a size twice")
        parser.require(options.images, "--buckets has no effect without --images: leave it out")
        parser.without_effect(options, "image_size", reason="with --buckets, which names the sizes")
    if options.from_latents:
        parser.require(
            options.vae_name,
            "--from-latents needs --vae-name: nothing there says which autoencoder they come from",
        )
        parser.without_effect(
            options,
            "vae",
            "flip",
            "image_column",
            reason="with --from-latents, which encodes nothing",
        )


def main(arguments: list[str]) -> None:
    """Arguments to request to packed latents, or to their check."""
    options = parse_arguments(arguments)
    from promoe_ds.data.buckets.dataset import latent_folders
    from promoe_ds.data.buckets.encode import encode_buckets
    from promoe_ds.data.encode import encode
    from promoe_ds.data.shards import measure_folder, verify
    from promoe_ds.data.sources.files import fetch_from_hub
    from promoe_ds.data.sources.packing import EncodeRequest
    from promoe_ds.data.text.packed import verify_texts

    log = get_logger("encode")
    with joined_processes(options.device) as team:
        if options.verify is not None:
            for folder in latent_folders(options.verify):
                index = verify(folder, team)
                log.info(
                    "%s: all %d records of %d shards are what was written",
                    folder,
                    index.count,
                    len(index.shards),
                )
                if (texts := verify_texts(folder, team)) is not None:
                    log.info("%s: so are all %d captions", folder, texts.counts.captions)
            return
        if options.measure is not None:
            for folder in latent_folders(options.measure):
                log.info("%s: %s", folder, measure_folder(folder, team).statistics)
            return
        given = {each.name: getattr(options, each.name, None) for each in fields(EncodeRequest)}
        path = options.images or options.from_latents
        source = team.main_first(lambda: fetch_from_hub(path, options.split))
        given |= {"source": source, "from_latents": bool(options.from_latents)}
        asked = EncodeRequest(**given)
        if options.buckets is None:
            indices = {options.out: encode(asked, team)}
        else:
            indices = encode_buckets(asked, options.buckets, team)
        for folder, index in indices.items():
            log.info(
                "%s: %d records of %d classes in %d shards, %d images skipped",
                folder,
                index.count,
                len(index.classes),
                len(index.shards),
                len(index.skipped),
            )
        if options.captions is not None:
            encode_captions(options, source, list(indices), team)


run = command(main)

if __name__ == "__main__":
    run()
