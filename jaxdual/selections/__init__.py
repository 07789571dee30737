"""What DySCO's steps selected: a page that shows it token by token, and a command that makes one."""

from jaxdual.selections.page import selection_page

__all__ = ["selection_page"]
