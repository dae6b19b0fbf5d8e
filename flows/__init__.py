"""The Prefect flow: the only package that imports prefect. Every task is a thin call into shards/ or pasnet/."""
