from tests.cache.conftest import build_store, spec, store  # noqa: F401
