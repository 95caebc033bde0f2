"""What a data source has beside its records, for those that tests make up."""

from typing import Any

from clip_jax.data.sources import Inventory


class InMemory:
    """A source without its records: who is one says how many there are, and what they are."""

    name: str = "memory"
    split: str = "test"
    classnames: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()

    def shard_of(self, index: int) -> str:
        return f"shard {index // 10}"

    def fingerprint(self) -> dict[str, Any]:
        return {"source": self.name, "split": self.split, "records": len(self)}

    def inventory(self) -> Inventory:
        return Inventory(shards=1)
