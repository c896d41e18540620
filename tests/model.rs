//! The consistency protocol, explored state by state: what must hold in every order of events, and what goes wrong
//! without each of its rules.
//!
//! Tests that wait and cut connections find the orders that happen often. The ones that hurt are rare: a process that
//! stops between two commands, a node that comes back with what it held a second ago. So small models of the
//! protocol are searched exhaustively here, each with as few variables as its property needs:
//!
//! - `fills`: readers, writers and one entry. What the fence is for.
//! - `flights`: readers of one process. Who may share an answer.
//! - `rounds`: outbox, watermark, trust; restarts, crashes, evictions. What a memory may claim.
//! - `tier`: the memory in front of the memory.
//! - `holds`: `consistency: hold`.
//! - `beside`: the same where holds stand beside the entry.
//! - `clock`: how old a hit may be, with a clock that steps.
//! - `numbers`: the same without the memory's clock.
//!
//! Only the last two count time. In the others a lock may end, a process may stop and a message may be late at any point.
//! For every rule there is a variant without it, in which the search must find a counterexample within bounds in
//! which the rule holds. That a sound model has not become too small to fail is told by its `sometimes` properties.
//!
//! `MODEL=print` in the environment shows the counterexamples, and how much was searched.

#![allow(unreachable_pub, reason = "modules of one binary")]

use std::fmt::Debug;
use std::hash::Hash;
use std::time::Instant;

use stateright::{Checker, HasDiscoveries, Model};

#[path = "model/beside.rs"]
mod beside;
#[path = "model/claims.rs"]
mod claims;
#[path = "model/clock.rs"]
mod clock;
#[path = "model/database.rs"]
mod database;
#[path = "model/entry.rs"]
mod entry;
#[path = "model/fills.rs"]
mod fills;
#[path = "model/flights.rs"]
mod flights;
#[path = "model/holds.rs"]
mod holds;
#[path = "model/numbers.rs"]
mod numbers;
#[path = "model/reader.rs"]
mod reader;
#[path = "model/rounds.rs"]
mod rounds;
#[path = "model/tier.rs"]
mod tier;
#[path = "model/world.rs"]
mod world;

use beside::Beside;
use clock::{Believes, Clocks};
use entry::{Answer, Command, Entry};
use fills::Fills;
use flights::Flights;
use holds::Holds;
use numbers::Numbers;
use reader::{Rules, SOUND};
use rounds::{Registered, Rounds};
use tier::Tiers;

const QUIET: &str = "no key is stale when all is quiet";
const ACKNOWLEDGED: &str = "no read that began after an acknowledged write returns older";
const BOUNDED: &str = "no hit on a trusted memory is older than its S";
const TIER: &str = "no hit in the tier is older than its S";
const LINEAR: &str = "no read returns older than a write or a read that ended before it began";

/// Searches all states: every property holds in all of them, and everything worth seeing is seen.
#[track_caller]
fn holds<M>(model: M)
where
    M: Model + Send + Sync + 'static,
    M::State: Hash + Send + Sync + Clone + PartialEq + Debug + 'static,
    M::Action: Clone + PartialEq + Debug,
{
    let started = Instant::now();
    let checker = model.checker().spawn_bfs().join();
    if printing() {
        let (states, depth) = (checker.unique_state_count(), checker.max_depth());
        println!("{states} states, depth {depth}, {:?}", started.elapsed());
    }
    checker.assert_properties();
}

/// Searches until `property` is broken, which it must be.
#[track_caller]
fn fails<M>(model: M, property: &'static str)
where
    M: Model + Send + Sync + 'static,
    M::State: Hash + Send + Sync + Clone + PartialEq + Debug + 'static,
    M::Action: Clone + PartialEq + Debug,
{
    let started = Instant::now();
    let found = HasDiscoveries::AllOf([property].into());
    let checker = model.checker().finish_when(found).spawn_bfs().join();
    let path = checker.assert_any_discovery(property);
    if printing() {
        println!("{} states, {:?}: {path}", checker.unique_state_count(), started.elapsed());
    }
}

fn printing() -> bool {
    std::env::var_os("MODEL").is_some_and(|value| value == "print")
}

// One entry, by itself.

const LEASE: Command<u8> = Command::Lease { fence: 1, tag: 7, lock: 10, spare: 0, refreshes: None };
const OTHER_LEASE: Command<u8> = Command::Lease { fence: 2, tag: 7, lock: 10, spare: 0, refreshes: None };
const FILL: Command<u8> = Command::Fill { fence: 1, tag: 7, value: 5, ttl: 100, grace: 50 };

/// Tells a fresh entry all of it, each at its time, and collects the answers.
fn told(commands: &[(u64, Command<u8>)]) -> Vec<Answer<u8>> {
    let mut entry = Entry::Absent;
    let mut tell = |(now, command): &(u64, Command<u8>)| {
        let (next, answer) = std::mem::take(&mut entry).step(*now, command.clone());
        entry = next;
        answer
    };
    commands.iter().map(&mut tell).collect()
}

#[test]
fn an_entry_is_filled_once_by_whoever_has_the_lease() {
    let [free, taken] = [Answer::Fill { stale: None }, Answer::Wait { stale: None }];
    let answers = told(&[(0, LEASE), (1, OTHER_LEASE), (2, FILL), (3, FILL), (4, OTHER_LEASE)]);
    assert_eq!(answers, [free, taken, Answer::Stored, Answer::Fenced, Answer::Hit(5)]);
}

#[test]
fn an_invalidation_a_lock_that_ended_and_a_release_destroy_the_fence() {
    let free = || Answer::Fill { stale: None };
    assert_eq!(told(&[(0, LEASE), (1, Command::Invalidate), (2, FILL)]), [free(), Answer::Done, Answer::Gone]);
    assert_eq!(told(&[(0, LEASE), (10, FILL)]), [free(), Answer::Gone]);
    assert_eq!(told(&[(0, LEASE), (10, OTHER_LEASE), (11, FILL)]), [free(), free(), Answer::Fenced]);
    let release = Command::Release { fence: 1 };
    assert_eq!(told(&[(0, LEASE), (1, release), (2, OTHER_LEASE)]), [free(), Answer::Done, free()]);
}

#[test]
fn a_lock_lasts_as_long_as_its_filler_renews_it() {
    let renew = |fence| Command::Renew { fence, lock: 10 };
    let answers = told(&[(0, LEASE), (9, renew(1)), (9, renew(2)), (18, FILL), (19, renew(1))]);
    let free = Answer::Fill { stale: None };
    assert_eq!(answers, [free, Answer::Done, Answer::Refused, Answer::Stored, Answer::Refused]);
}

#[test]
fn a_stale_value_is_refreshed_by_one_and_served_to_the_others() {
    let read = Command::Read { tag: 7 };
    let answers = told(&[(0, LEASE), (0, FILL), (100, read.clone()), (100, OTHER_LEASE), (101, LEASE), (110, LEASE)]);
    let stale = || Some(5);
    let expected = [Answer::Soft(5), Answer::Fill { stale: stale() }, Answer::Wait { stale: stale() }];
    assert_eq!(answers[2..5], expected);
    // The refresh has run out, and is anybody's.
    assert_eq!(answers[5], Answer::Fill { stale: stale() });
    assert_eq!(told(&[(0, LEASE), (0, FILL), (150, read)])[2], Answer::Absent);
}

#[test]
fn a_fresh_value_is_refreshed_ahead_by_one_and_stays_a_hit() {
    let early = |fence, stored| Command::Lease { fence, tag: 7, lock: 10, spare: 0, refreshes: Some(stored) };
    let read = Command::Read { tag: 7 };
    let renewed = Command::Fill { fence: 2, tag: 7, value: 6, ttl: 100, grace: 50 };
    let commands = [(0, LEASE), (0, FILL), (80, early(2, 1)), (80, early(2, 0)), (81, early(3, 0)), (82, read.clone())];
    let refreshed = [(83, OTHER_LEASE), (84, renewed), (85, early(3, 0)), (150, read)];
    let answers = told(&[commands.as_slice(), &refreshed].concat());
    let there = || Some(5);
    // Another than was seen; taken; taken already; a hit meanwhile, for those who ask for no refresh too.
    let before = [Answer::Hit(5), Answer::Fill { stale: there() }, Answer::Wait { stale: there() }, Answer::Fresh(5)];
    assert_eq!(answers[2..6], before);
    assert_eq!(answers[6..], [Answer::Hit(5), Answer::Stored, Answer::Hit(6), Answer::Fresh(6)]);
    // Whatever drops it drops the refresh.
    let dropped = [(0, LEASE), (0, FILL), (90, early(2, 0)), (91, Command::Invalidate)];
    let late = [(92, Command::Fill { fence: 2, tag: 7, value: 6, ttl: 100, grace: 50 })];
    assert_eq!(told(&[dropped.as_slice(), &late].concat())[4], Answer::Gone);
}

#[test]
fn a_value_of_another_tag_is_absent_but_left_alone_while_it_is_young() {
    let lease = |spare| Command::Lease { fence: 2, tag: 8, lock: 10, spare, refreshes: None };
    let answers = told(&[(0, LEASE), (0, FILL), (1, Command::Read { tag: 8 }), (1, lease(2)), (1, lease(1))]);
    assert_eq!(answers[2..], [Answer::Absent, Answer::Past, Answer::Fill { stale: None }]);
}

#[test]
fn a_hold_ends_by_its_owner_or_by_its_time() {
    let hold = || Command::Hold { owner: 9, life: 10 };
    let release = |owner| Command::ReleaseHold { owner };
    let answers = told(&[(0, LEASE), (1, hold()), (2, FILL), (2, LEASE), (3, Command::Invalidate), (4, release(8))]);
    assert_eq!(answers[1..], [Answer::Done, Answer::Fenced, Answer::Past, Answer::Done, Answer::Refused]);
    let read = Command::Read { tag: 7 };
    assert_eq!(told(&[(0, hold()), (9, read.clone()), (10, read)])[1..], [Answer::Held, Answer::Absent]);
    assert_eq!(told(&[(0, hold()), (1, release(9)), (2, LEASE)])[2], Answer::Fill { stale: None });
}

// Fills.

#[test]
fn fences_keep_old_rows_out() {
    holds(Fills::SOUND);
}

#[test]
fn a_plain_set_stores_an_old_row() {
    fails(Fills { rules: Rules { fenced: false, ..SOUND }, ..Fills::SOUND }, QUIET);
}

#[test]
fn a_constant_fence_lets_an_old_row_in() {
    fails(Fills { rules: Rules { random: false, ..SOUND }, ..Fills::SOUND }, QUIET);
}

#[test]
fn a_resent_lease_resurrects_an_old_row() {
    fails(Fills { resends: true, ..Fills::SOUND }, QUIET);
}

// Flights.

/// A memory that restarts with an old dump costs states: two readers are enough for what it can do.
const FLIGHTS_AND_A_RESTART: Flights = Flights { readers: 2, restarts: 1, ..Flights::SOUND };

#[test]
fn passengers_get_nothing_older_than_their_question() {
    holds(Flights::SOUND);
}

#[test]
fn passengers_get_nothing_older_from_a_memory_that_went_back() {
    holds(FLIGHTS_AND_A_RESTART);
}

#[test]
fn a_flight_shared_with_everyone_brings_what_was_before_a_write() {
    fails(Flights { shared: true, ..Flights::SOUND }, ACKNOWLEDGED);
}

#[test]
fn passengers_get_nothing_older_where_groups_are_dropped() {
    holds(Flights { grouped: true, ..Flights::SOUND });
}

#[test]
fn a_fill_stored_under_a_former_generation_proves_nothing() {
    fails(Flights { grouped: true, same_tag: false, ..Flights::SOUND }, ACKNOWLEDGED);
}

#[test]
fn a_fill_stored_on_another_memory_than_its_lease_proves_nothing() {
    fails(Flights { one_memory: false, same_tag: false, ..FLIGHTS_AND_A_RESTART }, ACKNOWLEDGED);
}

// Rounds.

/// One transaction is enough, where it does not matter which of two comes first.
const RESTARTS: Rounds = Rounds { restarts: 1, transactions: 1, ..Rounds::SOUND };
const PURGES: Rounds = Rounds { purges: true, transactions: 1, ..Rounds::SOUND };
const EVICTIONS: Rounds = Rounds { evictions: 1, generations: 1, transactions: 1, ..Rounds::SOUND };
const REGISTRATIONS: Rounds =
    Rounds { registered: Registered::Counted, evictions: 1, transactions: 1, ..Rounds::SOUND };
const CRASHES: Rounds = Rounds { crashes: 1, ..Rounds::SOUND };
const WITHOUT_AN_OUTBOX: Rounds = Rounds { outbox: false, restarts: 1, ..Rounds::SOUND };

#[test]
fn rounds_leave_nothing_stale() {
    holds(Rounds::SOUND);
}

/// As many as can be searched in a moment; more of either were searched by hand.
#[test]
fn rounds_leave_nothing_stale_of_what_two_processes_fill() {
    holds(Rounds { fills: [1, 1], looks: 2, ..Rounds::SOUND });
}

#[test]
fn what_is_owed_since_now_is_never_delivered() {
    fails(Rounds { since_s: false, ..Rounds::SOUND }, QUIET);
}

#[test]
fn a_cursor_over_ids_skips_a_slow_transaction() {
    fails(Rounds { xip: false, ..Rounds::SOUND }, QUIET);
}

#[test]
fn a_memory_that_went_back_catches_up_before_it_is_trusted() {
    holds(RESTARTS);
}

#[test]
fn a_round_that_ends_on_another_memory_claims_what_it_did_not_deliver() {
    fails(Rounds { one_memory: false, ..RESTARTS }, QUIET);
}

#[test]
fn a_memory_that_is_trusted_by_itself_serves_what_was_invalidated() {
    fails(Rounds { trust: false, ..RESTARTS }, ACKNOWLEDGED);
}

#[test]
fn a_memory_replaced_under_a_living_connection_goes_unnoticed() {
    fails(Rounds { breaks: false, ..RESTARTS }, BOUNDED);
}

#[test]
fn a_memory_behind_the_horizon_begins_anew() {
    holds(PURGES);
}

#[test]
fn a_memory_behind_the_horizon_misses_what_was_purged() {
    fails(Rounds { horizon: false, ..PURGES }, QUIET);
}

#[test]
fn a_lost_control_key_begins_a_new_epoch() {
    holds(EVICTIONS);
}

#[test]
fn a_control_key_that_is_put_back_undoes_a_generation() {
    fails(Rounds { puts_back: true, ..EVICTIONS }, QUIET);
}

#[test]
fn a_registration_refuses_the_rounds_that_looked_before_it() {
    holds(REGISTRATIONS);
}

#[test]
fn a_silent_registration_is_missed_by_a_round_in_flight() {
    fails(Rounds { registered: Registered::Silently, evictions: 0, ..REGISTRATIONS }, QUIET);
}

#[test]
fn numbers_that_begin_again_let_a_round_in_that_looked_before_a_registration() {
    fails(Rounds { unique: false, ..REGISTRATIONS }, QUIET);
}

#[test]
fn a_control_key_that_is_put_back_forgets_a_registration() {
    fails(Rounds { puts_back: true, ..REGISTRATIONS }, QUIET);
}

#[test]
fn a_crash_of_the_database_begins_a_new_epoch() {
    holds(CRASHES);
}

#[test]
fn an_older_snapshot_leaves_a_row_that_a_crash_took_back() {
    fails(Rounds { lives: false, ..CRASHES }, QUIET);
}

#[test]
fn without_an_outbox_a_memory_that_went_back_begins_a_new_epoch() {
    holds(WITHOUT_AN_OUTBOX);
}

#[test]
fn without_an_outbox_a_memory_that_is_trusted_by_itself_stays_stale() {
    fails(Rounds { trust: false, ..WITHOUT_AN_OUTBOX }, QUIET);
}

// The tier.

#[test]
fn a_tier_keeps_up_with_its_node() {
    holds(Tiers::SOUND);
}

#[test]
fn a_tier_keeps_up_with_a_node_that_went_back() {
    holds(Tiers { restarts: 1, rounds: 3, commits: 1, ..Tiers::SOUND });
}

#[test]
fn a_tier_that_does_not_note_n_keeps_what_a_batch_took_away() {
    fails(Tiers { noted: false, ..Tiers::SOUND }, TIER);
}

#[test]
fn a_tier_that_notes_n_alone_mistakes_one_memory_for_another() {
    fails(Tiers { whose: false, ..Tiers::SOUND }, TIER);
}

#[test]
fn a_tier_misses_a_batch_when_numbers_are_put_back() {
    fails(Tiers { puts_back: true, ..Tiers::SOUND }, TIER);
}

// Holds.

#[test]
fn a_hold_makes_reads_and_writes_linear() {
    holds(Holds::SOUND);
}

#[test]
fn without_a_hold_time_may_go_back_between_two_readers() {
    fails(Holds { puts: false, ..Holds::SOUND }, LINEAR);
}

#[test]
fn an_invalidation_that_opens_a_hold_lets_an_old_row_in() {
    fails(Holds { respected: false, ..Holds::SOUND }, LINEAR);
}

#[test]
fn a_release_after_a_hold_that_was_not_seen_opens_nobody_elses() {
    holds(Holds { unseen_expires: false, ..Holds::SOUND });
}

#[test]
fn a_release_after_an_unknown_commit_is_too_early() {
    fails(Holds { unknown_expires: false, ..Holds::SOUND }, LINEAR);
}

#[test]
fn a_hold_beside_the_entry_makes_reads_and_writes_linear() {
    holds(Beside::SOUND);
}

#[test]
fn a_lease_written_after_the_look_for_holds_lets_an_old_row_in() {
    fails(Beside { lease_first: false, ..Beside::SOUND }, LINEAR);
}

#[test]
fn a_hold_written_after_the_entry_was_destroyed_leaves_a_lease_alive() {
    fails(Beside { hold_first: false, ..Beside::SOUND }, LINEAR);
}

#[test]
fn a_writer_who_gives_up_anothers_hold_lets_an_old_row_in() {
    fails(Beside { own: false, ..Beside::SOUND }, LINEAR);
}

// Clocks.

#[test]
fn no_clock_that_steps_back_makes_a_hit_older_than_it_may_be() {
    holds(Clocks::SOUND);
}

#[test]
fn a_t_that_was_ahead_is_no_better_when_the_clock_has_reached_it() {
    fails(Clocks { never_grows: false, ..Clocks::SOUND }, BOUNDED);
}

#[test]
fn a_t_ahead_of_the_clock_says_nothing() {
    fails(Clocks { none_ahead: false, ..Clocks::SOUND }, BOUNDED);
}

#[test]
fn a_new_connection_cannot_tell_how_old_a_t_is_that_was_there_before_it() {
    fails(Clocks { believes: Believes::Any, ..Clocks::SOUND }, BOUNDED);
}

#[test]
fn a_t_that_moved_may_have_been_taken_before_the_clock_stepped() {
    fails(Clocks { believes: Believes::Moved, ..Clocks::SOUND }, BOUNDED);
}

#[test]
fn a_round_during_which_the_clock_stepped_claims_too_young_a_t() {
    fails(Clocks { measured: false, ..Clocks::SOUND }, BOUNDED);
}

// Numbers.

#[test]
fn numbers_alone_tell_how_old_a_hit_may_be() {
    holds(Numbers::SOUND);
}

#[test]
fn numbers_alone_tell_it_where_the_control_key_is_lost() {
    holds(Numbers { losses: 1, ..Numbers::SOUND });
}

#[test]
fn numbers_alone_tell_it_where_two_run_rounds() {
    holds(Numbers { runners: 2, ..Numbers::SOUND });
}

#[test]
fn a_look_that_saw_the_number_before_says_nothing_of_a_snapshot() {
    fails(Numbers { least: 1, ..Numbers::SOUND }, BOUNDED);
}

#[test]
fn a_look_says_nothing_of_the_time_until_its_reply_came() {
    fails(Numbers { sent: false, ..Numbers::SOUND }, BOUNDED);
}

#[test]
fn a_snapshot_taken_before_the_look_may_be_of_any_age() {
    fails(Numbers { after: false, ..Numbers::SOUND }, BOUNDED);
}

#[test]
fn a_number_that_is_written_blindly_says_nothing() {
    fails(Numbers { compared: false, runners: 2, writes: 4, ..Numbers::SOUND }, BOUNDED);
}
