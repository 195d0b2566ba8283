"""What all data of a report have in common."""

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """Data that nothing changes after it was collected."""

    model_config = ConfigDict(frozen=True, extra="forbid")
