"""Pictures and clips on disk with the request inside, and the request back from them; without torch."""

from imprompt.output.record import Record as Record
from imprompt.output.save import check_target as check_target
from imprompt.output.save import check_together as check_together
from imprompt.output.save import free_name as free_name
from imprompt.output.save import names as names
from imprompt.output.save import our_frames as our_frames
from imprompt.output.save import read_record as read_record
from imprompt.output.save import read_request as read_request
from imprompt.output.save import recorded_fps as recorded_fps
from imprompt.output.save import save as save
from imprompt.output.save import save_page as save_page
from imprompt.output.save import save_together as save_together
