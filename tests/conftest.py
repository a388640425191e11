"""What holds for all tests."""

from hypothesis import HealthCheck, settings

# The same examples in every run, and none refused because the machine is slow.
settings.register_profile(
    "repeatable",
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("repeatable")
