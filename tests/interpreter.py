"""Triton's interpreter, mended: the GPU programs on the CPU, each operation as one of numpy.

Triton 3.6 interprets a cast to bfloat16 by cutting the low bits off, where every device rounds to
nearest even, and reads scalars in a way that numpy 2.4 refuses. Both are put right here; the
programs themselves are not touched. Triton interprets where TRITON_INTERPRET=1.
"""

from functools import cache
from typing import Any

import numpy as np
import torch


@cache
def mend() -> None:
    """Put both right, for this process; and overflow to infinity is no news."""
    from triton.runtime import interpreter

    convert, patch = interpreter._convert_float, interpreter._patch_lang_tensor

    def convert_float(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source.is_fp32() and target.is_bf16():
            rounded = torch.from_numpy(np.ascontiguousarray(data)).to(torch.bfloat16)
            return rounded.view(torch.int16).numpy().view(np.uint16).reshape(data.shape)
        if source.is_bf16() and target.is_fp32():
            return data.view(np.uint16).astype(np.uint32) << np.uint32(16)
        return convert(data, source, target, rounding)

    def patch_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._convert_float = convert_float
    interpreter._patch_lang_tensor = patch_tensor
    np.seterr(over="ignore")
