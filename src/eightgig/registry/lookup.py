"""Finding a model by name, folder or hub id."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import eightgig
from eightgig.core.errors import UnsupportedModel
from eightgig.registry import derived, hub
from eightgig.registry.discovery import families
from eightgig.registry.facts import ModelFacts
from eightgig.registry.family import ModelSpec

# Ships inside the package, trained by `benchmarks/demo_model`. Its facts are read off its config.json.
PACKAGED_LICENCE = "Apache-2.0"
PACKAGED_LICENCE_URL = "https://www.apache.org/licenses/LICENSE-2.0"
PACKAGED_MODELS = {"eightgig-demo": Path(eightgig.__file__).parent / "demo" / "model"}

ADAPTER_CONFIG = "adapter_config.json"


def all_specs() -> tuple[ModelSpec, ...]:
    """Every model known by name, in the order of the families, then those that ship inside the package."""
    specs = [ModelSpec(family, facts) for family in families() for facts in family.models]
    return (*specs, *map(_packaged_spec, PACKAGED_MODELS))


def get(name: str) -> ModelSpec:
    """The model with the registry name or alias `name` (capitals don't matter).

    Raises:
        UnsupportedModel: no model is called so; the message names the nearest.
    """
    wanted = name.strip().lower()
    if wanted in PACKAGED_MODELS:
        return _packaged_spec(wanted)
    for family in families():
        for facts in family.models:
            if wanted == facts.name or wanted in facts.aliases:
                return ModelSpec(family, facts)
    raise _unknown(name, f"no model is called {name!r}")


def resolve(reference: str, revision: str | None = None) -> ModelSpec:
    """The model that `reference` means: a registry name or alias, else an existing folder, else a hub id.

    Args:
        reference: what the user typed as `model.name`.
        revision: branch, tag or commit at the hub; only used for hub ids outside the registry.

    Raises:
        UnsupportedModel: nothing of that name, or of an architecture that no family handles.
        EnvironmentProblem: the hub can't be reached, or does not hand the model out.
    """
    if is_known(reference):
        return get(reference)
    folder = Path(reference).expanduser()
    if folder.is_dir():
        return _spec_of_folder(folder.resolve(), name=folder.resolve().name)
    if folder.is_file():
        raise UnsupportedModel(
            f"{reference} is a file",
            expected="a folder in the transformers format (config.json, *.safetensors), a registry name or a hub id",
            next_step="give the folder that holds the file",
        )
    if reference.startswith((".", "/", "~")) or reference.count("/") > 1 or "\\" in reference:
        raise _unknown(reference, f"there is no folder {reference}")
    if "/" not in reference:
        raise _unknown(reference, f"no model is called {reference!r}, and there is no folder of that name")
    config = hub.read_config(reference, revision)
    return _spec_of_config(
        config, name=reference, folder=None, hub_id=reference, source=f"{hub.endpoint()}/{reference}"
    )


def _known_names() -> Iterable[str]:
    yield from PACKAGED_MODELS
    for family in families():
        for facts in family.models:
            yield facts.name
            yield from facts.aliases


def is_known(name: str) -> bool:
    """Whether `name` is a registry name or alias, so that `resolve` needs neither a folder nor the hub."""
    return name.strip().lower() in set(_known_names())


def _unknown(name: str, found: str) -> UnsupportedModel:
    nearest = difflib.get_close_matches(name.strip().lower(), sorted(set(_known_names())), n=3, cutoff=0.5)
    names = sorted([*PACKAGED_MODELS, *(facts.name for family in families() for facts in family.models)])
    guess = f"did you mean {' or '.join(nearest)}?" if nearest else f"known names: {', '.join(names)}"
    return UnsupportedModel(
        found,
        expected="a registry name, an existing folder, or a hub id like llava-hf/llava-1.5-7b-hf",
        next_step=guess,
    )


def _packaged_spec(name: str) -> ModelSpec:
    spec = _spec_of_folder(PACKAGED_MODELS[name], name=name)
    return replace(spec, facts=replace(spec.facts, licence=PACKAGED_LICENCE, licence_url=PACKAGED_LICENCE_URL))


def _spec_of_folder(folder: Path, *, name: str) -> ModelSpec:
    path = folder / "config.json"
    if not path.is_file():
        raise _no_config(folder)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"a {type(config).__name__}, not an object")
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both
        raise UnsupportedModel(
            f"{path} is not JSON of a model: {error}",
            expected="the config.json that transformers' save_pretrained writes",
            next_step="copy the model's folder again; the file is damaged",
        ) from error
    return _spec_of_config(config, name=name, folder=folder, hub_id=None, source=str(path))


def _no_config(folder: Path) -> UnsupportedModel:
    held = sorted(item.name for item in folder.iterdir())[:8] if folder.is_dir() else []
    if ADAPTER_CONFIG in held:
        base = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
        return UnsupportedModel(
            f"{folder} holds an adapter, not a model",
            expected=f"the base model as model.name (this adapter's is {base})",
            next_step="give the base model here and the adapter's folder to `eightgig predict`",
        )
    return UnsupportedModel(
        f"{folder} has no config.json (it holds {', '.join(held) or 'nothing'})",
        expected="a folder in the transformers format: config.json, *.safetensors, tokenizer and processor files",
        next_step="give the folder that save_pretrained or `hf download` wrote",
    )


def _spec_of_config(
    config: dict[str, Any], *, name: str, folder: Path | None, hub_id: str | None, source: str
) -> ModelSpec:
    model_type = config.get("model_type")
    family = next((family for family in families() if model_type in family.model_types), None)
    if family is None:
        known = sorted(model_type for family in families() for model_type in family.model_types)
        family = derived.derive_family(config, location=str(folder or hub_id), source=source, known_types=known)
    from huggingface_hub.errors import StrictDataclassError

    try:
        facts: ModelFacts = family.facts_from_config(config, name=name, folder=folder, hub_id=hub_id)
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UnsupportedModel(
            f"{source} can't be read as that of a {family.name} model: {' '.join(str(error).split())[:200]}",
            expected="the config.json that transformers' save_pretrained writes",
            next_step="copy the model again; the file was changed, or is of a version that transformers can't read",
        ) from error
    return ModelSpec(family, facts)
