"""`amg audit`: a model drawn unguided and guided, and judged by measures guidance saw and never saw.

Reads as the data flows: plan (what is drawn) -> folder (what is kept) -> draw -> references, judges (what
looks at the pictures) -> measure (figures) -> tables, page (what is written).
"""
