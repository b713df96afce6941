"""firstsight card: the model card of a student."""

from firstsight.cli.arguments import Student, check_student


def card(variant: Student) -> None:
    """Print a student's model card.

    It is made from the measured figures in metrics/."""
    check_student(variant)
    from firstsight.publishing.model_card import model_card

    print(model_card(variant, f"models/{variant}"), end="")
