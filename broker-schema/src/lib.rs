//! What travels between trainers, dispatchers and workers: ids, subjects, messages, codec. No I/O.
