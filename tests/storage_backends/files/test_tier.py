"""A files tier by name, from a configuration."""

from pathlib import Path

from kvtier import registry
from kvtier.config import load_config
from kvtier.storage_backends.files import FileRecords
from kvtier.testing.record_samples import fetch, sample_bytes, sample_record


def test_a_files_tier_is_opened_by_its_name(tmp_path: Path) -> None:
    config = load_config(
        {
            "durability": "relaxed",
            "tiers": [{"name": "nvme", "backend": "files", "path": str(tmp_path / "kv"), "capacity": "1MiB"}],
        }
    )
    (tier,) = config.tiers

    with registry.record_stores.resolve(tier.backend)(tier, config) as store:
        assert isinstance(store, FileRecords)
        assert (store.options.capacity, store.options.durability) == (1 << 20, "relaxed")
        store.put([sample_record(1, 5000)])
        assert fetch(store, 1, 5000) == sample_bytes(1, 0, 5000)
