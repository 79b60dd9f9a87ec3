"""Command-line options that say what is trained, and by which arms."""

import argparse
from fnmatch import fnmatch

from .cases import PRESETS, Case
from .providers import ARMS, Arm


def add_case_options(parser: argparse.ArgumentParser, default_arms: list[str]) -> None:
    """Add --preset, --hidden, --layers, --tokens and --arms."""
    parser.add_argument("--preset", choices=PRESETS, default="512x8", help="hidden x layers")
    parser.add_argument("--hidden", type=int, help="another width, a multiple of 64")
    parser.add_argument("--layers", type=int, help="another depth")
    parser.add_argument("--tokens", type=int, help="tokens a step, in sequences of 128")
    parser.add_argument(
        "--arms",
        nargs="+",
        default=default_arms,
        metavar="NAME",
        help=f"* stands for any letters; allowed: {', '.join(ARMS)}",
    )


def chosen_case(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Case:
    """The case that the options name; a wrong size ends the program with one line."""
    try:
        return PRESETS[options.preset].resized(options.hidden, options.layers, options.tokens)
    except ValueError as error:
        parser.error(f"--{error}")


def chosen_arms(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[Arm]:
    """The arms that the options name, each once; an unknown name ends the program likewise."""
    chosen: list[Arm] = []
    for pattern in options.arms:
        found = [arm for path, arm in ARMS.items() if fnmatch(path, pattern)]
        if not found:
            parser.error(f"--arms: nothing is called {pattern!r}; allowed: {', '.join(ARMS)}")
        chosen += [arm for arm in found if arm not in chosen]
    return chosen
