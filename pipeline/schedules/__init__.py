"""Orders of operations as data: how they are chosen, checked, printed and saved."""
