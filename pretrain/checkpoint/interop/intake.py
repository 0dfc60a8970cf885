"""A Hugging Face folder -> a run folder with one checkpoint, which everything here can use like a trained one."""

from __future__ import annotations

import re
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from parallel.config import guess
from parallel.state import model_tensors
from pretrain.checkpoint.durable import fsync_folder
from pretrain.checkpoint.interop import FORMATS, vocabulary
from pretrain.checkpoint.interop.export import PREFIX
from pretrain.checkpoint.interop.form import Format, find, model_of
from pretrain.checkpoint.interop.shards import Shards
from pretrain.checkpoint.interop.theirs import Theirs
from pretrain.checkpoint.interop.weights import Absent, Group
from pretrain.checkpoint.lifecycle import Checkpoints
from pretrain.data.tokenizer import find as tokenizer_of
from pretrain.data.tokenizer import fingerprint
from pretrain.model.decoder import Decoder, DecoderConfig

CHECKPOINTS = "checkpoints"
# Tables that a model can compute again, and layers for predicting further tokens, which the classes there do not load either.
SURPLUS = re.compile(r"rotary_emb\.inv_freq$|(^|\.)mtp\.")


@dataclass(frozen=True)
class Imported:
    """What was written. notes: lines on what a person should know."""

    checkpoint: Path
    form: Format
    tensors: int
    notes: list[str]


def intake(source: Path, out: Path) -> Imported:
    """Write the model of a Hugging Face folder to a new run folder `out`: one checkpoint of step 0, and the tokenizer.

    Weights become fp32. Raises ValueError for a model that cannot be expressed here, CheckpointError for missing or damaged
    files.
    """
    theirs = Theirs.of_folder(source)
    form = _form(theirs)
    config = model_of(form, theirs)
    with torch.device("meta"):
        own = model_tensors(Decoder(config))
    plan, files = list(form.weights(config)), Shards(source)
    notes = [f"{theirs.where}: {key} was not used" for key in theirs.unread()]
    chosen = _match(files, plan, own)
    notes += _surplus(files, chosen, config)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty; give a folder that does not exist")
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = out.with_name(f".{out.name}.{secrets.token_hex(4)}.partial")
    fresh.mkdir()
    try:
        section = {"model": config.model_dump(mode="json")}
        meta: dict[str, Any] = {"step": 0, "tokens": 0, "config": section, "origin": form.name}
        length = theirs.get("max_position_embeddings", "model_max_length")
        meta |= {} if length is None else {"context": length}
        carried = vocabulary.intake(source, fresh)
        if not carried:
            meta["tokenizer"] = fingerprint(tokenizer_of(fresh))
        saved = Checkpoints(fresh / CHECKPOINTS, keep=None).save(0, _tensors(files, chosen, own), meta)
        # As in configs/models/, so that a run file can say `model: FOLDER/config.yaml`.
        (fresh / "config.yaml").write_text(yaml.safe_dump(section, sort_keys=False, width=120))
        notes += carried
        if out.exists():
            out.rmdir()
        fresh.rename(out)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    fsync_folder(out.parent)
    return Imported(out / CHECKPOINTS / saved.name, form, len(own), notes)


def _form(theirs: Theirs) -> Format:
    kind = theirs.need("model_type")
    if kind not in FORMATS:
        near = guess(str(kind), list(FORMATS))
        raise ValueError(f"{theirs.where}: model_type = {kind}: no known format; {near}formats: {', '.join(FORMATS)}")
    return find(kind)


def _match(files: Shards, plan: Sequence[Group | Absent], own: dict[str, Tensor]) -> list[Group | Absent]:
    """For each part of the plan the way in which the folder holds it. Raises ValueError naming tensors that do not fit."""
    chosen: list[Group | Absent] = []
    faults: list[str] = []
    for one in plan:
        if isinstance(one, Absent):
            chosen.append(one)
            continue
        ways = (one, *one.others)
        way = next((way for way in ways if all(name in files.places for name in way.theirs)), None)
        if way is None:
            missing = [name for name in one.theirs if name not in files.places]
            faults.append(f"missing: {missing[0]}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else ""))
            continue
        chosen.append(way)
        faults += _misfits(files, way, [own[PREFIX + name] for name in one.ours])
    covered = {name for one in plan for name in ([one.ours] if isinstance(one, Absent) else one.ours)}
    assert {PREFIX + name for name in covered} == set(own), "the format's map is not that of the model"
    if faults:
        more = f"\n  and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise ValueError(f"{files.folder} does not fit its config.json:\n  " + "\n  ".join(faults[:20]) + more)
    return chosen


def _misfits(files: Shards, way: Group, ours: list[Tensor]) -> list[str]:
    shapes = [files.shape(name) for name in way.theirs]
    expected = [tuple(t.shape) for t in way.out(ours)]
    if shapes == expected:
        return []
    try:  # cut elsewhere, but of the same whole?
        back = way.back([torch.empty(shape, device="meta") for shape in shapes])
        if [t.shape for t in back] == [t.shape for t in ours]:
            return []
    except (RuntimeError, ValueError, IndexError):
        pass
    wrong = [(n, a, b) for n, a, b in zip(way.theirs, shapes, expected) if a != b]
    return [f"{name} is {list(found)}, and should be {list(right)}" for name, found, right in wrong]


def _surplus(files: Shards, chosen: Sequence[Group | Absent], config: DecoderConfig) -> list[str]:
    """Notes on tensors that are left out for a reason. Raises ValueError if others are left over."""
    used = {name for one in chosen if isinstance(one, Group) for name in one.theirs}
    left = sorted(set(files.places) - used)
    if config.tie_embeddings and "lm_head.weight" in left:
        embedding = next(
            one.theirs[0] for one in chosen if isinstance(one, Group) and one.ours == ("embedding.weight",)
        )
        if not torch.equal(files.read("lm_head.weight"), files.read(embedding)):
            raise ValueError(
                f"{files.folder}: config.json ties the head to the embedding, but lm_head.weight is another tensor; "
                "set tie_word_embeddings to false there"
            )
        left.remove("lm_head.weight")
    known = [name for name in left if SURPLUS.search(name)]
    odd = [name for name in left if name not in known]
    if odd:
        more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
        raise ValueError(f"{files.folder} holds {odd[0]}{more}, which its config.json does not account for")
    extra = [name for name in known if "mtp." in name]
    return [f"{len(extra)} tensors for predicting further tokens ({extra[0]}, ...) were left out"] if extra else []


def _tensors(files: Shards, chosen: Sequence[Group | Absent], own: dict[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for one in chosen:
        if isinstance(one, Absent):
            like = own[PREFIX + one.ours]
            found[PREFIX + one.ours] = torch.full(like.shape, one.value, dtype=like.dtype, device="cpu")
            continue
        for name, tensor in zip(one.ours, one.back([files.read(name) for name in one.theirs]), strict=True):
            like = own[PREFIX + name]
            # A copy: what safetensors gives may be the file itself.
            found[PREFIX + name] = torch.empty(like.shape, dtype=like.dtype, device="cpu").copy_(tensor)
    return found
