"""The only package that reads or changes what Lightning keeps to itself.

Everything here is used by the floors above through plain values, so that a new Lightning release can break one package and
its tests (``tests/lightning_port``) say which line.

    state.py      what a checkpoint is made of, and where Lightning has it
    restoring.py  how what a checkpoint holds gets into the trainer, and through whose hands
    hooks.py      the trainer's callbacks, and when they and the module have their turn
    progress.py   where the fit loop is, whether it goes on, and how it ends
    logged.py     what reaches the loggers, and under which step
    schedules.py  learning-rate schedules that wait for a metric
    epoch_results.py  what has been logged for the epoch so far, and what torchmetrics have counted
    loaders.py    the loaders that a fit trains from, and what it has taken of them
    processes.py  the processes of a run: before training starts, in it, and at the end
    requeue.py    what Lightning saves and loads where Slurm requeues a job
    loggers.py    Lightning's loggers

Others call ``lightning_port.is_over(trainer)``, wherever that is here.
"""

from __future__ import annotations

from nemologger.lightning_port.hooks import at_end_of_backward as at_end_of_backward
from nemologger.lightning_port.hooks import behind_module as behind_module
from nemologger.lightning_port.hooks import callback_saves_itself as callback_saves_itself
from nemologger.lightning_port.hooks import callbacks as callbacks
from nemologger.lightning_port.hooks import callbacks_of_the_program as callbacks_of_the_program
from nemologger.lightning_port.hooks import forget_behind_module as forget_behind_module
from nemologger.lightning_port.hooks import go_on_accumulating as go_on_accumulating
from nemologger.lightning_port.hooks import go_on_clipping as go_on_clipping
from nemologger.lightning_port.hooks import has_comm_hook as has_comm_hook
from nemologger.lightning_port.hooks import hooks_between_steps as hooks_between_steps
from nemologger.lightning_port.hooks import move_to_end as move_to_end
from nemologger.lightning_port.hooks import set_callbacks as set_callbacks
from nemologger.lightning_port.hooks import without_empty_hooks as without_empty_hooks
from nemologger.lightning_port.loaders import data_module as data_module
from nemologger.lightning_port.loaders import data_reader as data_reader
from nemologger.lightning_port.loaders import drop_loader_states as drop_loader_states
from nemologger.lightning_port.loaders import fetch_again as fetch_again
from nemologger.lightning_port.loaders import fetched as fetched
from nemologger.lightning_port.loaders import fetches_ahead as fetches_ahead
from nemologger.lightning_port.loaders import has_taken_of_new_loaders as has_taken_of_new_loaders
from nemologger.lightning_port.loaders import last_reload_epoch as last_reload_epoch
from nemologger.lightning_port.loaders import reloads as reloads
from nemologger.lightning_port.loaders import rescale_saved_batches as rescale_saved_batches
from nemologger.lightning_port.loaders import saved_batches as saved_batches
from nemologger.lightning_port.loaders import see_loaders as see_loaders
from nemologger.lightning_port.loaders import set_last_reload_epoch as set_last_reload_epoch
from nemologger.lightning_port.loaders import tell_samplers_the_epoch as tell_samplers_the_epoch
from nemologger.lightning_port.loaders import training_loaders as training_loaders
from nemologger.lightning_port.loaders import trains_from as trains_from
from nemologger.lightning_port.loaders import validation_loaders as validation_loaders
from nemologger.lightning_port.loaders import watch_fetches as watch_fetches
from nemologger.lightning_port.loaders import will_reload as will_reload
from nemologger.lightning_port.loaders import wrap_training_loaders as wrap_training_loaders
from nemologger.lightning_port.logged import log_batch as log_batch
from nemologger.lightning_port.logged import log_is_due as log_is_due
from nemologger.lightning_port.logged import logged_step as logged_step
from nemologger.lightning_port.logged import logs_this_batch as logs_this_batch
from nemologger.lightning_port.logged import next_logged_step as next_logged_step
from nemologger.lightning_port.logged import restore_metrics as restore_metrics
from nemologger.lightning_port.logged import set_next_logged_step as set_next_logged_step
from nemologger.lightning_port.logged import show_metrics as show_metrics
from nemologger.lightning_port.loggers import flat_params as flat_params
from nemologger.lightning_port.loggers import is_default_logger as is_default_logger
from nemologger.lightning_port.loggers import is_open as is_open
from nemologger.lightning_port.loggers import log_wandb_checkpoints_by as log_wandb_checkpoints_by
from nemologger.lightning_port.loggers import log_wandb_files as log_wandb_files
from nemologger.lightning_port.loggers import move_tensorboard as move_tensorboard
from nemologger.lightning_port.loggers import move_wandb as move_wandb
from nemologger.lightning_port.loggers import reopen_tensorboard as reopen_tensorboard
from nemologger.lightning_port.loggers import set_default_directory as set_default_directory
from nemologger.lightning_port.loggers import tensorboard_place as tensorboard_place
from nemologger.lightning_port.loggers import wandb_artifact as wandb_artifact
from nemologger.lightning_port.loggers import wandb_metric as wandb_metric
from nemologger.lightning_port.loggers import wandb_run_id as wandb_run_id
from nemologger.lightning_port.own_objects import at as at
from nemologger.lightning_port.own_objects import places_of as places_of
from nemologger.lightning_port.processes import check_is_no_child as check_is_no_child
from nemologger.lightning_port.processes import connect_as_patiently as connect_as_patiently
from nemologger.lightning_port.processes import end_forked as end_forked
from nemologger.lightning_port.processes import forget_decisions as forget_decisions
from nemologger.lightning_port.processes import forks_later as forks_later
from nemologger.lightning_port.processes import interruptible as interruptible
from nemologger.lightning_port.processes import launches_on_each_node as launches_on_each_node
from nemologger.lightning_port.processes import let_processes_end as let_processes_end
from nemologger.lightning_port.processes import on_sigterm as on_sigterm
from nemologger.lightning_port.processes import patience as patience
from nemologger.lightning_port.processes import ranks_before_fit as ranks_before_fit
from nemologger.lightning_port.processes import step_reached as step_reached
from nemologger.lightning_port.progress import begin_next_epoch_anew as begin_next_epoch_anew
from nemologger.lightning_port.progress import close_last_batch as close_last_batch
from nemologger.lightning_port.progress import close_trained_epoch as close_trained_epoch
from nemologger.lightning_port.progress import count_left_out as count_left_out
from nemologger.lightning_port.progress import count_no_more_epochs as count_no_more_epochs
from nemologger.lightning_port.progress import drop_interrupted_validation as drop_interrupted_validation
from nemologger.lightning_port.progress import epoch_is_trained as epoch_is_trained
from nemologger.lightning_port.progress import epochs_done as epochs_done
from nemologger.lightning_port.progress import forget_begun_batch as forget_begun_batch
from nemologger.lightning_port.progress import goes_on_within_epoch as goes_on_within_epoch
from nemologger.lightning_port.progress import has_begun_batch as has_begun_batch
from nemologger.lightning_port.progress import has_more_epochs as has_more_epochs
from nemologger.lightning_port.progress import has_validation as has_validation
from nemologger.lightning_port.progress import is_accumulating as is_accumulating
from nemologger.lightning_port.progress import is_over as is_over
from nemologger.lightning_port.progress import is_stopping as is_stopping
from nemologger.lightning_port.progress import is_trial as is_trial
from nemologger.lightning_port.progress import is_within_step as is_within_step
from nemologger.lightning_port.progress import leave_fit as leave_fit
from nemologger.lightning_port.progress import modes_of_training as modes_of_training
from nemologger.lightning_port.progress import passes as passes
from nemologger.lightning_port.progress import position as position
from nemologger.lightning_port.progress import position_in as position_in
from nemologger.lightning_port.progress import steps_taken as steps_taken
from nemologger.lightning_port.progress import validate_first as validate_first
from nemologger.lightning_port.progress import validates_for_stop as validates_for_stop
from nemologger.lightning_port.progress import validation_follows as validation_follows
from nemologger.lightning_port.progress import validation_is_left_out as validation_is_left_out
from nemologger.lightning_port.requeue import go_on_from as go_on_from
from nemologger.lightning_port.requeue import goes_on_elsewhere as goes_on_elsewhere
from nemologger.lightning_port.requeue import leave_requeue_files as leave_requeue_files
from nemologger.lightning_port.requeue import on_requeue_signal as on_requeue_signal
from nemologger.lightning_port.requeue import requeue_file as requeue_file
from nemologger.lightning_port.requeue import requeue_signal as requeue_signal
from nemologger.lightning_port.restoring import is_in_hook as is_in_hook
from nemologger.lightning_port.restoring import loads_as_is as loads_as_is
from nemologger.lightning_port.restoring import loads_model_as_is as loads_model_as_is
from nemologger.lightning_port.restoring import restore_again as restore_again
from nemologger.lightning_port.restoring import settle_precision as settle_precision
from nemologger.lightning_port.restoring import use_checkpoint_io as use_checkpoint_io
from nemologger.lightning_port.restoring import will_rewrite_state as will_rewrite_state
from nemologger.lightning_port.schedules import PlateauSteps as PlateauSteps
from nemologger.lightning_port.schedules import averages_were_taken as averages_were_taken
from nemologger.lightning_port.schedules import go_on_averaging as go_on_averaging
from nemologger.lightning_port.schedules import plateau_steps as plateau_steps
from nemologger.lightning_port.schedules import step_plateau as step_plateau
from nemologger.lightning_port.schedules import step_plateau_at_epoch_end as step_plateau_at_epoch_end
from nemologger.lightning_port.state import KeepsWeights as KeepsWeights
from nemologger.lightning_port.state import checkpoint_directory as checkpoint_directory
from nemologger.lightning_port.state import hyperparameters as hyperparameters
from nemologger.lightning_port.state import names_of_lightning as names_of_lightning
from nemologger.lightning_port.state import optimizer_names as optimizer_names
from nemologger.lightning_port.state import saves_itself as saves_itself
from nemologger.lightning_port.state import saves_more as saves_more
from nemologger.lightning_port.state import training_state as training_state
from nemologger.lightning_port.state import zeroes_by_hand as zeroes_by_hand
