"""The table of formats of published quantized models, by `quant_method` in config.json."""

from collections.abc import Callable, Mapping
from typing import Any

from lora_jax.core.errors import ModelFileError
from lora_jax.core.foreign import shown_value
from lora_jax.files.quantized import awq, bitsandbytes, compressed_tensors, fp8, gptq, mxfp4, own

#: `read(tensors, config, dtype)` returns the tensors by name, with one `StoredCodes` in the place
#: of the parts of each quantized weight. Only what is small is read from the file.
Read = Callable[[Mapping[str, Any], Mapping[str, Any], Any], dict[str, Any]]

FORMATS: dict[str, Read] = {
    "bitsandbytes": bitsandbytes.read,
    "gptq": gptq.read,
    "awq": awq.read,
    "compressed-tensors": compressed_tensors.read,
    "fp8": fp8.read,
    "fbgemm_fp8": fp8.read,
    "mxfp4": mxfp4.read,
    own.METHOD: own.read,
}


def read(tensors: Mapping[str, Any], config: Any, dtype: Any) -> dict[str, Any]:
    """Return the tensors of a quantized model by the names of the float model's.

    Args:
      tensors: of the file, read by `np.asarray`.
      config: `quantization_config` of config.json.
      dtype: of the quantized weights, where their own parts do not say; None if it is unknown.

    Raises:
      ModelFileError: the format is unknown, or parts are missing or of another shape or dtype.
    """
    method = config.get("quant_method") if isinstance(config, dict) else None
    if isinstance(config, dict) and method is None:
        bits = {"load_in_4bit", "load_in_8bit"}  # of old files of bitsandbytes
        method = "bitsandbytes" if bits & config.keys() else None
    if not isinstance(method, str) or method not in FORMATS:
        raise ModelFileError(
            f"quantization_config: quant_method {shown_value(method)} is not one of "
            f"{', '.join(FORMATS)}; dequantize the model with the library that wrote it"
        )
    return FORMATS[method](tensors, config, dtype)
