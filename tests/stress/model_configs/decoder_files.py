"""config.json as other versions of transformers write it."""

import json
from pathlib import Path
from typing import Any

from tests.stress.model_configs.decoder_fields import FULL, SLIDING
from tests.stress.model_configs.draw import Draw, shorten

Fields = dict[str, Any]
#: "new": transformers 5; "old": transformers 4; "short": what an author writes by hand.
STYLES = ("new", "old", "short")


def rewrite(folder: Path, style: str, draw: Draw) -> None:
    """Write the config.json of a directory in another style."""
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    text = settings.get("text_config", settings)
    if style in ("old", "short"):
        _older(text, draw)
        if "dtype" in settings:
            settings["torch_dtype"] = settings.pop("dtype")
        text.pop("dtype", None)
    if style == "short":
        shorten(draw, text, keep=("rope_theta", "rope_scaling"))
    path.write_text(json.dumps(settings, indent=1))


def _older(text: Fields, draw: Draw) -> None:
    """Replace rope_parameters by rope_theta and rope_scaling, and layer_types by a pattern."""
    given = text.pop("rope_parameters", None)
    if not given:
        return
    is_by_type = FULL in given or SLIDING in given
    if is_by_type:
        local, given = given.get(SLIDING), given.get(FULL)
        if local is None or given is None or local["rope_type"] != "default":
            text["rope_parameters"] = {FULL: given, SLIDING: local}
            return
        text["rope_local_base_freq"] = local["rope_theta"]
    scaling = dict(given)
    text["rope_theta"] = scaling.pop("rope_theta")
    kind = scaling.pop("rope_type")
    if "partial_rotary_factor" in scaling and kind != "proportional":
        text["partial_rotary_factor"] = scaling.pop("partial_rotary_factor")
    # With one rotation per type of layer, transformers 5 overlooks the older name, unlike 4.
    name = "rope_type" if is_by_type else draw.one_of(["rope_type", "type"])
    text["rope_scaling"] = None if kind == "default" else {name: kind}
    if kind != "default":
        text["rope_scaling"] |= scaling
