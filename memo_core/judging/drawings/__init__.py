"""Pictures of what was heard, remembered and measured."""
