"""Which pages of the cache are whose: a free list with counts of users."""

from __future__ import annotations

from collections.abc import Sequence


class PagePool:
    """Pages 0 to num_pages - 1; one is free again when its last user gives it back."""

    def __init__(self, num_pages: int):
        self._free = list(range(num_pages))[::-1]
        self._users = [0] * num_pages

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, number: int) -> list[int]:
        """So many free pages, each with one user."""
        assert number <= self.num_free, f"{number} pages wanted of {self.num_free}"
        pages = [self._free.pop() for _ in range(number)]
        for page in pages:
            self._users[page] = 1
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """One more user of each of these pages."""
        for page in pages:
            assert self._users[page] > 0, f"page {page} is free"
            self._users[page] += 1

    def give_back(self, pages: Sequence[int]) -> None:
        """One user less of each."""
        for page in pages:
            self._users[page] -= 1
            assert self._users[page] >= 0, f"page {page} was free"
            if self._users[page] == 0:
                self._free.append(page)
