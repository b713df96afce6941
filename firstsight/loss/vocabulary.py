"""The V tokens over which teacher and student are compared: those that both have, and the ends of their answers."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SharedVocabulary:
    """Say which tokens of the teacher and of the student mean the same.

    Ids below `common` do. `ends` are the teacher's and the student's end token, where they are not one of these: the
    teacher ends its answers with the first, the student with the second, and the loss takes them for one token.
    """

    common: int
    ends: tuple[int, int] | None = None

    @property
    def size(self) -> int:
        """Return V: the common tokens and, if neither end is among them, one more."""
        return self.common + (self.ends is not None and min(self.ends) >= self.common)

    @property
    def exchanged(self) -> tuple[int, int] | None:
        """Return two tokens that change places in the student's logits, so that its end is among the first V; or None.

        The first is where the teacher's logits (`of_teacher`) have the end.
        """
        if self.ends is None or self.ends[1] < self.common:
            return None
        place = min(self.ends[0], self.common)
        return None if place == self.ends[1] else (place, self.ends[1])

    def of_teacher(self, head: Tensor) -> Tensor:
        """Return the rows [V, H] of the teacher's head [V_t, H], in the order of the student's tokens."""
        if self.ends is None:
            return head[: self.common]
        teacher_end, student_end = self.ends
        rows = torch.arange(self.size, device=head.device)
        if student_end < self.common:
            rows[student_end] = teacher_end
            # The teacher's end is another word to the student, and the student's to the teacher.
            if teacher_end < self.common:
                rows[teacher_end] = student_end
        elif teacher_end >= self.common:
            rows[self.common] = teacher_end
        return head[rows]
