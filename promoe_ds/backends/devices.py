"""Devices by name: what their makers state. Sources: docs/guides/planning.md."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Device:
    """One accelerator.

    memory: bytes; flops: dense FLOP/s by precision; memory_bandwidth: bytes/s; link_bandwidth:
    bytes/s that one device sends to the others of its node.
    """

    name: str
    memory: float
    flops: dict[str, float]
    memory_bandwidth: float
    link_bandwidth: float


def _device(
    name: str,
    *,
    gigabytes: float,
    bf16: float,
    fp32: float,
    terabytes_per_second: float,
    link: float,
) -> Device:
    return Device(
        name=name,
        memory=gigabytes * 1e9,
        flops={"bf16": bf16 * 1e12, "fp32": fp32 * 1e12},
        memory_bandwidth=terabytes_per_second * 1e12,
        link_bandwidth=link * 1e9,
    )


#: By the name that `--gpu` takes. fp32 is the rate without TF32, which the trainer does not switch
# on.
DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        _device("a100", gigabytes=80, bf16=312, fp32=19.5, terabytes_per_second=2.039, link=300),
        _device("h100", gigabytes=80, bf16=989, fp32=67, terabytes_per_second=3.35, link=450),
        _device("h100-pcie", gigabytes=80, bf16=756, fp32=51, terabytes_per_second=2.0, link=300),
        _device("h100-nvl", gigabytes=94, bf16=835, fp32=60, terabytes_per_second=3.9, link=300),
        _device("h200", gigabytes=141, bf16=989, fp32=67, terabytes_per_second=4.8, link=450),
        _device("h200-nvl", gigabytes=141, bf16=835, fp32=60, terabytes_per_second=4.8, link=450),
        _device("b200", gigabytes=180, bf16=2250, fp32=80, terabytes_per_second=8.0, link=900),
    )
}


def find_device(product_name: str) -> Device | None:
    """Return a device by the name that its driver gives, None if the table lacks it.

    "NVIDIA H100 PCIe" is an h100-pcie, "NVIDIA H100 80GB HBM3" an h100: of the names whose parts
    all occur, the longest.
    """
    found = [
        name for name in DEVICES if all(part in product_name.lower() for part in name.split("-"))
    ]
    return DEVICES[max(found, key=len)] if found else None
