"""PEFT's adapter_config.json, which every trainer built on PEFT can start from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import ClassVar

from memplan.exporters import Exporter, Statement, Task
from memplan.exporters._header import header
from memplan.exporters._lora import lora_config, verify


class Peft(Exporter):
    """adapter_config.json, and what there is to say of it."""

    summary: ClassVar[str] = "PEFT's adapter_config.json"

    def check(self, task: Task) -> Statement:
        return verify(task, lora_config(task))

    def files(self, task: Task, statement: Statement) -> Mapping[str, str]:
        notes = ("JSON has no comments, so this stands beside the configuration.",)
        said = "\n\n".join(header(task, statement, notes))
        return {
            "adapter_config.json": json.dumps(lora_config(task), indent=2) + "\n",
            "README.md": f"# adapter_config.json\n\n{said}\n",
        }


PART = Peft()
