from __future__ import annotations

import pytest

from unicuco.testing.tiny import tiny_model_folder
from unicuco.testing.variants import VariantCase, make_variant_case


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> VariantCase:
    folder = tmp_path_factory.mktemp("export") / "llama"
    return make_variant_case(tiny_model_folder(folder, tied=True))
