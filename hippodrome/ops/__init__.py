"""Operations: one readable reference each, and backends that say why they cannot run a call."""
