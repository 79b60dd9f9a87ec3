"""Tables in plain text."""

from artemis.text_table import aligned


def test_the_first_columns_are_flush_left_and_the_others_right():
    rows = [("layer", "kind", "MB"), ("q", "lora", "1,000"), ("mlp.up", "a", "2")]
    assert aligned(rows, left=2) == [
        "layer   kind     MB",
        "q       lora  1,000",
        "mlp.up  a         2",
    ]
