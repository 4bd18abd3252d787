"""gptlab schema"""

import argparse
import json
from typing import Any

from gptlab.cli.common import add_verb


def add_to(verbs: Any) -> None:
    help = "Print the JSON schema of recipe or study files, with which editors complete TOML."
    v = add_verb(verbs, "schema", do_schema, help)
    v.add_argument("kind", nargs="?", choices=["recipe", "study"], default="recipe", help="default: recipe")


def do_schema(options: argparse.Namespace) -> None:
    from gptlab.config.schema import json_schema

    print(json.dumps(json_schema(options.kind), indent=1))
