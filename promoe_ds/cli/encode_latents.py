"""Encode a tree of images into packed latents, plain and mirrored: one process, or many under
torchrun or deepspeed.

    torchrun --nproc-per-node 8 -m promoe_ds.cli.encode_latents --images imagenet/train --out
    latents \\
        --vae stabilityai/sd-vae-ft-mse
    promoe-encode --from-npz sd-vae-ft-mse_Latents_256img_npz --vae-name stabilityai/sd-vae-ft-mse
    --out latents
    promoe-encode --images pictures --out latents --vae stabilityai/sd-vae-ft-mse --captions .txt
    promoe-encode --verify latents

The same command resumes after an interruption, on any number of processes. --from-npz packs the
cache of the published code (`.latent.npz`) or of DiffMoE. The folder's format is in
docs/guides/imagenet.md; `--set data.path=latents` trains on it.
"""

import argparse
from dataclasses import fields
from pathlib import Path

from promoe_ds.cli.encode_text import add_captions, encode_captions
from promoe_ds.cli.entry import command, joined_processes
from promoe_ds.cli.options import Parser, number
from promoe_ds.logs import get_logger


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(__doc__)
    add = parser.add_argument
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help=(
            "tree of images, one folder a class, any depth below; or the "
            "folder above with train and val"
        ),
    )
    task.add_argument(
        "--from-npz",
        type=Path,
        metavar="DIR",
        help="tree of .npz files, one an image, one folder a class",
    )
    task.add_argument(
        "--verify", type=Path, metavar="DIR", help="only read finished latents and check every byte"
    )
    add("--out", type=Path, metavar="DIR", help="folder to write")
    add("--vae", metavar="DIR_OR_ID", help="AutoencoderKL: folder or hub id")
    add(
        "--vae-name",
        metavar="NAME",
        help="what the index calls it, if not by --vae: recipes name it in data.vae",
    )
    add(
        "--split",
        default="train",
        choices=["train", "val", "test"],
        help="where DIR holds these folders",
    )
    add("--image-size", type=number(ge=1), default=256, help="pixels a side after the crop")
    add(
        "--flip",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also encode the mirrored image",
    )
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
    add("--max-corrupt", type=int, default=0, help="unreadable images that are named and skipped")
    add_captions(parser, required=False)
    parser.add_process()
    options = parser.parse_args(arguments)
    _check(parser, options)
    return options


def _check(parser: Parser, options: argparse.Namespace) -> None:
    """End with what does not go together."""
    parser.require(options.verify or options.out, "--out is needed")
    parser.require(options.vae or not options.images, "--images needs --vae")
    if options.verify or options.captions is None:
        texts = "captions", "text_encoder", "text_length", "text_dtype", "max_uncaptioned"
        why = "with --verify" if options.verify else "without --captions"
        parser.without_effect(options, *texts, reason=why)
    if options.from_npz:
        parser.require(
            options.vae_name,
            "--from-npz needs --vae-name: the files do not say which autoencoder they come from",
        )
        parser.without_effect(
            options, "vae", "flip", reason="with --from-npz, which encodes nothing"
        )


def main(arguments: list[str]) -> None:
    """Arguments to request to packed latents, or to their check."""
    options = parse_arguments(arguments)
    from promoe_ds.data.encode import EncodeRequest, encode
    from promoe_ds.data.shards import verify
    from promoe_ds.data.text.packed import verify_texts

    log = get_logger("encode")
    with joined_processes(options.device) as team:
        if options.verify is not None:
            index = verify(options.verify, team)
            log.info(
                "%s: all %d records of %d shards are what was written",
                options.verify,
                index.count,
                len(index.shards),
            )
            if (texts := verify_texts(options.verify, team)) is not None:
                log.info("%s: so are all %d captions", options.verify, texts.counts.captions)
            return
        given = {each.name: getattr(options, each.name, None) for each in fields(EncodeRequest)}
        given |= {"source": options.images or options.from_npz, "from_npz": bool(options.from_npz)}
        index = encode(EncodeRequest(**given), team)
        log.info(
            "%s: %d records of %d classes in %d shards, %d images skipped",
            options.out,
            index.count,
            len(index.classes),
            len(index.shards),
            len(index.skipped),
        )
        if options.captions is not None:
            source = options.images or options.from_npz
            encode_captions(options, source, options.out, team)


run = command(main)

if __name__ == "__main__":
    run()
