"""How the text of a flag, or of an entry of a YAML file, becomes a setting."""

import argparse


def boolean(text: str) -> bool:
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def whole_number(text: str) -> int:
    text = text.strip("[] ")  # fairseq writes update_freq=[1]
    if text.lstrip("+-").isdigit():
        return int(text)
    value = number(text)  # 1e6 is a whole number, too
    if not value.is_integer():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(value)


def number(text: str) -> float:
    try:
        return float(text.strip("[] "))  # fairseq writes lr=[0.0002]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def numbers(text: str) -> tuple:
    return tuple(number(part) for part in text.strip("()[] ").split(",") if part.strip())


# by the type of the setting
READERS = {bool: boolean, int: whole_number, float: number, str: str, tuple: numbers}
