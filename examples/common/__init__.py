"""Shared by the examples: data, networks, resumable training, results and figures."""

from importlib.util import find_spec

_PACKAGES = {
    "kdkernels": "pip install -e . --no-build-isolation",
    "sklearn": "pip install scikit-learn",
    "matplotlib": "pip install matplotlib",
    "tqdm": "pip install tqdm",
}
_missing = [name for name in _PACKAGES if find_spec(name) is None]
if _missing:
    raise SystemExit(
        f"The examples need {', '.join(_missing)}, not installed here. In the repository's root: "
        + " && ".join(_PACKAGES[name] for name in _missing)
        + "\nOr all at once: pip install -e '.[examples]' --no-build-isolation"
    )
