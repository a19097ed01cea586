"""What operations and messages cost: counted, measured, stored."""
