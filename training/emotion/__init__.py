"""Training of the emotion detector: label tables, readers, features, the head and its report (MEMO appendix A)."""
