"""Small trained parts beside a frozen base: one final class per file, one contract, PEFT's files."""
