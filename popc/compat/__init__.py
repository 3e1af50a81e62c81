"""Every private API of torch that popc uses."""

from popc.compat.dynamo import *  # noqa: F403
