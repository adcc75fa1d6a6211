"""Completion of keys and choices in bash, as a generated script that contains them all."""

from __future__ import annotations

from kdrl_mcore.config.help import documented_keys
from kdrl_mcore.config.sources import Sources
from kdrl_mcore.errors import ConfigError

COMMANDS = ("kdrl-train", "kdrl-evaluate", "kdrl-preflight", "kdrl-plan", "kdrl-study")
"""The commands that take overrides."""
SCRIPT = """# Completion of the keys of {commands}: source this file in ~/.bashrc.
declare -A _kdrl_choices=(
{choices}
)
_kdrl_keys="{keys}"
_kdrl() {{
  local line=${{COMP_LINE:0:COMP_POINT}} word key IFS=$' \\t\\n'
  word=${{line##*[[:space:]]}}
  if [[ $word == *=* ]]; then # by default the shell treats what follows = as a separate word
    key=${{word%%=*}}
    COMPREPLY=($(compgen -W "${{_kdrl_choices[$key]-}}" -- "${{word#*=}}"))
    [[ $COMP_WORDBREAKS == *=* ]] || COMPREPLY=("${{COMPREPLY[@]/#/$key=}}")
    COMPREPLY=("${{COMPREPLY[@]/%/ }}")
  elif [[ $word == -* ]]; then
    COMPREPLY=($(compgen -W "--config --config-dir --help" -- "$word"))
    COMPREPLY=("${{COMPREPLY[@]/%/ }}")
  else
    COMPREPLY=($(compgen -S = -W "$_kdrl_keys" -- "$word"))
  fi
}}
complete -o nospace -o default -F _kdrl {commands}
"""


def completion(shell: str) -> str:
    """The script to source.

    Raises:
        ConfigError: the shell is not bash.
    """
    if shell != "bash":
        raise ConfigError(f"--completion {shell} is not supported: use bash")
    sources = Sources()
    choices: dict[str, tuple[str, ...]] = {group: tuple(sources.choices(group)) for group in sources.groups()}
    keys = [key for key in documented_keys() if "[]" not in key.name]
    for key in keys:
        choices[key.name] = ("true", "false") if key.default in ("true", "false") else key.meta.choices
    listed = "\n".join(f'  [{name}]="{" ".join(values)}"' for name, values in choices.items() if values)
    return SCRIPT.format(commands=" ".join(COMMANDS), choices=listed, keys=" ".join(choices))
