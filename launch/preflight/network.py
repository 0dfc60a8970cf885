"""Network cards by what the kernel says of them: there, up, at full speed, without errors."""

from __future__ import annotations

from pathlib import Path

from launch.preflight.check import Check, Result, failed, not_checked, passed, warned
from launch.preflight.node import Node

FLAPS = 20  # changes of the carrier since the start; a few come with each restart of a switch
# Counters of InfiniBand and RoCE ports that stay at zero on a good cable.
COUNTERS = (
    "link_downed",
    "symbol_error",
    "port_rcv_errors",
    "local_link_integrity_errors",
    "excessive_buffer_overrun_errors",
)


def nics(node: Node) -> list[Result]:
    """Ethernet ports with a device behind them: not bridges, tunnels and the like."""
    cards = [folder for folder in node.folders("sys/class/net") if (folder / "device").exists()]
    if not cards:
        names = [folder.name for folder in node.folders("sys/class/net") if folder.name != "lo"]
        return [not_checked("no network card in /sys/class/net" + (f" (only {', '.join(names)})" if names else ""))]
    results, up = [], 0
    for card in cards:
        speed, mtu = node.number(card / "speed"), node.number(card / "mtu")
        state, carrier = node.read(card / "operstate") or "unknown", node.number(card / "carrier")
        errors = sum(node.number(card / "statistics" / name) or 0 for name in ("rx_errors", "tx_errors"))
        packets = sum(node.number(card / "statistics" / name) or 0 for name in ("rx_packets", "tx_packets"))
        flaps = node.number(card / "carrier_changes") or 0
        values = {
            "state": state,
            "mbit": speed,
            "mtu": mtu,
            "errors": errors,
            "packets": packets,
            "carrier_changes": flaps,
        }
        rate = f" {speed / 1000:g} Gbit/s" if speed and speed > 0 else ""
        text = f"{state}{rate}, MTU {mtu}"
        if state == "down" or carrier == 0:
            # No cable, or a cable that is broken: only a person knows which.
            results.append(warned(f"{text}: no link, if one should be there", card.name, **values))
            continue
        up += 1
        if errors > 1e-6 * packets + 10:
            results.append(warned(f"{text}: {errors} broken packets of {packets}", card.name, **values))
        elif flaps > FLAPS:
            results.append(warned(f"{text}: the link came or went {flaps} times since the start", card.name, **values))
        else:
            results.append(passed(text, card.name, **values))
    if not up:
        results.append(failed(f"none of {len(cards)} network card(s) has a link"))
    return results


def rdma(node: Node) -> list[Result]:
    devices = node.folders("sys/class/infiniband")
    if not devices:
        return [not_checked("no InfiniBand or RoCE card (/sys/class/infiniband): nodes would talk by TCP")]
    results, rates = [], {}
    for device in devices:
        for port in node.folders(str(device / "ports")):
            subject = f"{device.name}:{port.name}"
            result = _port(node, port, subject)
            results.append(result)
            if result.status != "fail":
                rates[subject] = result.values["rate"]
    if len(set(rates.values())) > 1:
        shown = ", ".join(f"{subject} {rate}" for subject, rate in rates.items())
        results.append(warned(f"not all ports run at one rate: {shown}", "rates"))
    return results


def _port(node: Node, port: Path, subject: str) -> Result:
    # "4: ACTIVE", "5: LinkUp"
    state, physical = ((node.read(port / name) or "?").rpartition(":")[2].strip() for name in ("state", "phys_state"))
    rate = node.read(port / "rate") or "unknown rate"
    layer = node.read(port / "link_layer") or ""
    counts = {name: count for name in COUNTERS if (count := node.number(port / "counters" / name))}
    values = {"state": state, "physical": physical, "rate": rate, "layer": layer, "counters": counts}
    text = f"{state}, {physical}, {rate}, {layer}"
    if state != "ACTIVE" or physical not in ("LinkUp", "?"):
        return failed(f"{text}: NCCL would do without this card, or fail on it", subject, **values)
    if layer == "Ethernet" and not _has_roce_v2(node, port):
        return failed(f"{text}: no RoCE v2 address: give its interface an IP address", subject, **values)
    if counts:
        shown = ", ".join(f"{name} {count}" for name, count in counts.items())
        return warned(f"{text}; since the start: {shown}", subject, **values)
    return passed(text, subject, **values)


def _has_roce_v2(node: Node, port: Path) -> bool:
    for kind in node.folders(str(port / "gid_attrs" / "types")):
        gid = (node.read(port / "gids" / kind.name) or "").replace(":", "").strip("0")
        if gid and (node.read(kind) or "").lower().replace(" ", "") == "rocev2":
            return True
    return False


CHECKS = (
    Check("nics", "network cards in /sys/class/net: link, speed, MTU, broken packets, links that come and go", nics),
    Check(
        "rdma", "InfiniBand and RoCE ports in /sys/class/infiniband: state, rate, RoCE v2 address, error counters", rdma
    ),
)
