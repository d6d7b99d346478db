"""What must not stand in a configuration. Imports nothing heavy."""

from __future__ import annotations

import re
from typing import Any

from models.errors import Refusal

_SECRET = re.compile(
    r"^[\w+.-]+://([^/?#]*@|[^#]*[?&]([^=&]*(key|token|secret|password|passwd|signature|credential)|auth|sig)=)",
    re.IGNORECASE,
)
_SECRET_NAME = r"[A-Za-z0-9_]*(?:KEY|KEY_ID|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)"
_SECRET_SET = re.compile(rf"\b({_SECRET_NAME})=[\"']?(?![\"'$`\s])\S", re.IGNORECASE)  # to a value, in words of a shell


def refuse_secrets(node: Any, key: str = "") -> None:
    """Refuse an address with a password or a key in it, wherever it stands: the configuration is written into the run
    folder, every manifest and the logger. The value is not said."""
    if isinstance(node, dict | list):
        for name, value in node.items() if isinstance(node, dict) else enumerate(node):
            refuse_secrets(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, str) and _SECRET.search(node):
        raise Refusal(
            f"{key}: the address holds a password or a key, and would be written into every record of the run; take it "
            f"out, and give it in an environment variable (of a served teacher teacher.endpoint.api_key_variable)"
        )


def refuse_secret_variables(site: Any) -> None:
    """Likewise of what a site sets for its jobs (launch.site): variables, and words of a shell that set some."""
    if not isinstance(site, dict):
        return
    variables = site.get("environment")
    found = [
        (f"environment.{name}", name)
        for name in (variables if isinstance(variables, dict) else {})
        if re.fullmatch(_SECRET_NAME, str(name), re.IGNORECASE)
    ]
    for part in ("options", "setup", "arguments"):
        lines = given if isinstance(given := site.get(part), list) else []
        found += [(f"{part}.{at}", told[1]) for at, each in enumerate(lines) if (told := _SECRET_SET.search(str(each)))]
    if found:
        key, name = found[0]
        raise Refusal(
            f"launch.site.{key}: {name} would be written into every record of the run; export it before the command "
            f"instead: sbatch hands the environment on"
        )
