"""Operations of vtok, one a file: `vtok.kernels`. Plain functions on tensors that know no model and no method."""

if __name__ == "kernels":
    # The repository's root is on sys.path (`python -m ...` from there), and this folder hides Hugging Face's `kernels`.
    # Step aside for that package where it is installed. Where it is not, transformers imports this to read a version,
    # so the import must succeed and show none.
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    from pathlib import Path

    _root = Path(__file__).resolve().parents[1]
    _spec = PathFinder.find_spec("kernels", [path for path in sys.path if Path(path).resolve() != _root])
    if _spec is not None and _spec.loader is not None:
        sys.modules["kernels"] = module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules["kernels"])
