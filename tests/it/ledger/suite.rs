//! What every store of the ledger must do. A store runs it with [`conformance`] and a function that makes a new place.
//!
//! Most of it is tables; their words are told in [`crate::ledger::table`].

use keybrake::audit::{Entry, Event};
use keybrake::call::{CallState, Outcome};
use keybrake::hold::{Facts, Lane};
use keybrake::id::KeyId;
use keybrake::key::Status;
use keybrake::ledger::query::{AuditFilter, CallFilter, KeyFilter};
use keybrake::ledger::{Admitted, LedgerError};
use keybrake::money::MicroUsd;
use keybrake::refusal::{Code, Refusal};
use keybrake::secret::Mode;
use keybrake::time::{DAY_MS, HOUR_MS};
use serde_json::{Map, Value};

use crate::ledger::table::check;
use crate::ledger::world::{Ask, START, World, admin, estate, usd};

/// Runs the suite on a store.
macro_rules! conformance {
    ($place:path) => {
        crate::ledger::suite::conformance!(
            $place: money_is_reserved_settled_and_booked caps_of_a_day caps_of_a_short_life other_caps
            money_out_has_a_cap_of_its_own calls_are_counted many_at_once_never_exceed_a_cap
            equal_calls_at_once_are_sent_once a_done_call_is_replayed other_parameters_are_named
            a_call_in_flight_is_not_sent_again a_doubt_is_sent_again_for_23_hours what_ends_a_doubt_and_what_does_not
            a_restart_makes_doubts a_declined_call_is_made_anew declined_content_gets_a_next_attempt
            content_keeps_its_attempt_until_stripe_looked a_declined_attempt_stays_declined eight_attempts_of_content more_than_was_held_closes_the_key
            one_hold_from_creation_to_its_end a_partial_capture_books_what_was_taken
            an_increment_costs_its_difference a_refused_increment_is_taken_back a_confirm_after_a_decline_is_held_anew
            a_busy_object_takes_no_second_call a_cancel_ends_open_and_doubtful_holds
            a_call_on_a_canceled_object_is_a_new_one a_key_used_for_another_object_keeps_its_own_hold
            a_doubt_found_executed_is_not_made_again sixteen_calls_on_one_object refunds_of_known_objects
            unpriced_calls_need_an_uncapped_key remembered_for_remember_days content_is_known_long_after
            what_is_open_is_remembered_and_kept rows_go_when_their_time_has_come
            a_late_cancel_of_a_dead_keys_object_is_no_error dead_keys_move_nothing
            the_kill_switch_stops_and_survives keys_are_listed_and_revoked the_clock_never_goes_back
            a_lowered_clock_opens_no_resend a_clock_that_is_set_back_opens_no_resend
            a_ledger_is_bound_once equal_refusals_are_counted
            one_row_for_each_call old_records_go_and_the_chain_holds a_hold_is_resolved_once
            an_object_made_elsewhere_is_read_before_it_is_held what_can_still_be_paid_stays_held
            a_ceiling_is_held_for_each_call a_hold_keeps_its_rate
            a_doubt_ends_by_what_is_found an_operator_ends_a_doubt_either_way what_is_forgotten_can_be_made_again
            a_key_says_when_a_declined_call_is_worth_another_try
        );
    };
    ($place:path: $($name:ident)*) => { $(
        #[tokio::test]
        async fn $name() {
            // A store that is not there says so itself.
            let Some(place) = Option::from($place()) else { return };
            crate::ledger::suite::$name(crate::ledger::world::World::new(place)).await;
        }
    )* };
}
pub(super) use conformance;

mod doubts;
pub(super) use doubts::{
    a_doubt_ends_by_what_is_found, a_key_says_when_a_declined_call_is_worth_another_try,
    an_operator_ends_a_doubt_either_way, what_is_forgotten_can_be_made_again,
};
mod elsewhere;
pub(super) use elsewhere::{
    a_ceiling_is_held_for_each_call, a_hold_keeps_its_rate,
    an_object_made_elsewhere_is_read_before_it_is_held, what_can_still_be_paid_stays_held,
};

pub(super) async fn money_is_reserved_settled_and_booked(world: World) {
    check(
        world,
        "
        key k daily=10
        k charge a 600                  -> send a
        sum k                           -> held 6.00 calls 1
        answer a moved 600 ch_a         -> spent 6.00
        sum k                           -> spent 6.00 calls 1
        sum k today                     -> spent 6.00 calls 1
        k charge b 401                  -> refuse spend_cap_exceeded daily
        k charge b 400                  -> send b
        answer b invalid                -> void 4.00
        sum k                           -> spent 6.00 calls 1
        k charge c 100                  -> send c
        answer c throttled              -> void 1.00
        k charge d 100                  -> send d
        answer d own_key                -> void 1.00
        k charge e 100                  -> send e
        answer e not_sent               -> void 1.00
        k charge f 100                  -> send f
        answer f silence                -> doubt 1.00
        k charge g 300                  -> send g
        sum k                           -> spent 6.00 held 3.00 doubt 1.00 calls 3
        k charge h 1                    -> refuse spend_cap_exceeded daily
        k charge i 0                    -> send i
        ",
    )
    .await;
}

pub(super) async fn caps_of_a_day(world: World) {
    check(
        world,
        "
        key k daily=10 total=25         # 01:00
        k charge a 1000                 -> send a
        pass 22h                        # 23:00
        answer a moved 1000 ch_a        -> spent 10.00
        k charge b 1                    -> refuse spend_cap_exceeded daily
        pass 1h                         # 00:00
        k charge c 1000                 -> send c
        pass 24h
        answer c silence                -> doubt 10.00
        sum k today                     -> nothing
        k charge d 501                  -> refuse spend_cap_exceeded total
        k charge d 500                  -> send d
        sum k                           -> spent 10.00 held 5.00 doubt 10.00 calls 3
        sum k today                     -> held 5.00 calls 1
        ",
    )
    .await;
}

pub(super) async fn caps_of_a_short_life(world: World) {
    check(
        world,
        "
        key k daily=10 lives=24h
        key l daily=10 lives=25h
        k charge a 1000                 -> send a
        l charge b 1000                 -> send b
        pass 23h
        k charge c 1                    -> refuse spend_cap_exceeded daily
        l charge d 1                    -> send d
        pass 1h
        k charge c 1                    -> refuse vault_key_expired
        answer a moved 1000 ch_a        -> spent 10.00
        ",
    )
    .await;
}

pub(super) async fn other_caps(world: World) {
    check(
        world,
        "
        key k daily=10 per_request=3
        k charge a 301                  -> refuse spend_cap_exceeded per_request
        k charge a 300                  -> send a
        key t total=5 daily=6
        t charge b 501                  -> refuse spend_cap_exceeded total
        t charge b 601                  -> refuse spend_cap_exceeded total
        key n capless                   # no figure is no leave
        n charge c 1                    -> refuse spend_cap_exceeded daily
        key u uncapped per_request=9000
        u charge d 900001               -> refuse spend_cap_exceeded per_request
        u charge d 900000               -> send d
        u charge e 900000               -> send e
        sum u                           -> held 18000.00 calls 2
        ",
    )
    .await;
}

pub(super) async fn money_out_has_a_cap_of_its_own(world: World) {
    check(
        world,
        "
        key k daily=10 out=5 max_calls=4
        k charge a 1000                 -> send a
        answer a moved 1000 ch_a        -> spent 10.00
        k refund r ch_a 501             -> refuse spend_cap_exceeded daily_out
        k refund r ch_a 300             -> send r
        answer r moved 300 re_1         -> spent 3.00
        k charge b 1                    -> refuse spend_cap_exceeded daily  # a refund gives nothing back
        k refund s ch_a 201             -> refuse spend_cap_exceeded daily_out
        k refund s ch_a 200             -> send s
        answer s silence                -> doubt 2.00
        sum k out                       -> spent 3.00 doubt 2.00 calls 2
        sum k                           -> spent 10.00 calls 1
        key l daily=10
        l refund q ch_a 1               -> refuse spend_cap_exceeded daily_out
        ",
    )
    .await;
}

pub(super) async fn calls_are_counted(world: World) {
    check(
        world,
        "
        key k max_calls=2 out=9
        k charge a 100                  -> send a
        answer a declined               -> void 1.00
        k intent b 100                  -> send b
        answer b pending 100 pi_b       -> open 1.00
        k confirm c pi_b                -> send c             # on the same hold
        answer c moved 100 pi_b         -> spent 1.00
        k refund r pi_b 100             -> send r
        answer r silence                -> doubt 1.00
        k charge d 100                  -> refuse call_limit_exceeded
        k refund s pi_b 1               -> refuse call_limit_exceeded
        k refund r pi_b 100             -> send r again
        answer r declined               -> void 1.00
        k charge d 100                  -> send d
        ",
    )
    .await;
}

pub(super) async fn many_at_once_never_exceed_a_cap(world: World) {
    let key = world.key("k", |key| key.caps.daily = Some(usd("10.00"))).await;
    let mut asked = tokio::task::JoinSet::new();
    for n in 0..60 {
        let admit = world.command(key, &Ask::charge(&format!("a{n}"), 70));
        let ledger = world.ledger().clone();
        asked.spawn(async move { ledger.admit(key, admit).await.unwrap() });
    }
    let (mut held, mut refused) = (Vec::new(), 0);
    for admitted in asked.join_all().await {
        match admitted {
            Admitted::Held(one) => held.push(one),
            Admitted::Refused(refusal) => {
                assert_eq!(refusal.code, Code::SpendCapExceeded);
                refused += 1;
            }
            Admitted::Replay { .. } | Admitted::Look(_) | Admitted::Elsewhere | Admitted::Tell(_) => {
                panic!("nothing was done before")
            }
        }
    }
    assert_eq!((held.len(), refused), (14, 46));
    for (n, one) in held.into_iter().enumerate() {
        let outcome = if n % 2 == 0 { Outcome::Spent { minor: 70 } } else { Outcome::Declined };
        world.ledger().resolve(one, world.resolve(outcome, &[], Some(200))).await.unwrap();
    }
    assert_eq!(world.total(key, Lane::In).counted(), usd("4.90"));
    world.check();
}

pub(super) async fn equal_calls_at_once_are_sent_once(world: World) {
    let key = world.key("k", |_| ()).await;
    let mut asked = tokio::task::JoinSet::new();
    for _ in 0..50 {
        let admit = world.command(key, &Ask::charge("a", 100));
        let ledger = world.ledger().clone();
        asked.spawn(async move { ledger.admit(key, admit).await.unwrap() });
    }
    let admitted = asked.join_all().await;
    let held = admitted.iter().filter(|admitted| matches!(admitted, Admitted::Held(_))).count();
    let in_use = |admitted: &&Admitted| match admitted {
        Admitted::Refused(refusal) => refusal.code == Code::IdempotencyKeyInUse,
        Admitted::Held(_)
        | Admitted::Replay { .. }
        | Admitted::Look(_)
        | Admitted::Elsewhere
        | Admitted::Tell(_) => false,
    };
    assert_eq!((held, admitted.iter().filter(in_use).count()), (1, 49));
    assert_eq!(world.total(key, Lane::In).held, usd("1.00"));
}

pub(super) async fn a_done_call_is_replayed(world: World) {
    check(
        world,
        "
        key k daily=10
        key l daily=1
        k charge a 600                  -> send a
        answer a moved 600 ch_a         -> spent 6.00
        k charge a 600                  -> replay
        l charge a 600                  -> replay             # under another key, and its cap is no matter
        restart
        l charge a 600                  -> replay
        pass 30d
        k charge a 600                  -> replay
        sum k                           -> spent 6.00 calls 1
        sum l                           -> nothing
        key c content
        c charge x 100                  -> send kb:1
        answer x moved 100 ch_x         -> spent 1.00
        c charge x 100                  -> replay
        k charge x 100                  -> send x             # callers' keys and contents are apart
        ",
    )
    .await;
}

pub(super) async fn other_parameters_are_named(world: World) {
    check(
        world,
        "
        key k
        key c content
        k charge a 600                  -> send a
        k charge a 700                  -> refuse idempotency_error amount
        answer a moved 600 ch_a         -> spent 6.00
        k charge a 700                  -> refuse idempotency_error amount
        k charge a 600 currency=eur     -> refuse idempotency_error currency
        k intent a 600                  -> refuse idempotency_error endpoint
        k charge d 600                  -> send d
        answer d silence                -> doubt 6.00
        k charge d 700                  -> refuse idempotency_error amount
        k charge b 600                  -> send b
        answer b declined               -> void 6.00
        k charge b 700                  -> refuse idempotency_error amount   # as at Stripe, for a day
        pass 24h
        k charge b 700                  -> send b
        k charge e 600                  -> send e
        answer e invalid                -> void 6.00
        k charge e 700                  -> send e             # a refusal binds nothing
        c charge x 100                  -> send kb:1
        answer x moved 100 ch_x         -> spent 1.00
        c charge x 200                  -> refuse idempotency_error amount
        ",
    )
    .await;
}

pub(super) async fn a_call_in_flight_is_not_sent_again(world: World) {
    check(
        world,
        "
        key k
        key l
        k charge a 600                  -> send a
        k charge a 600                  -> refuse idempotency_key_in_use
        l charge a 600                  -> refuse idempotency_key_in_use
        answer a not_sent               -> void 6.00
        l charge a 600                  -> send a
        sum k                           -> nothing
        sum l                           -> held 6.00 calls 1
        ",
    )
    .await;
}

pub(super) async fn a_doubt_is_sent_again_for_23_hours(world: World) {
    check(
        world,
        "
        key k daily=10
        key l daily=1
        key m client
        k charge a 600                  -> send a
        pass 1m
        answer a silence                -> doubt 6.00
        call a                          -> doubt 1:unknown
        l charge a 600                  -> send a again       # by anyone, within k's hold
        k charge a 600                  -> refuse idempotency_key_in_use
        answer a silence                -> doubt 6.00
        pass 1378m
        k charge a 600                  -> send a again
        answer a unclear                -> doubt 6.00
        pass 1m                         # 23 hours after the first send
        k charge a 600                  -> refuse outcome_unknown
        sum k                           -> doubt 6.00 calls 1
        sum l                           -> nothing
        pass 40d
        tick
        k charge a 600                  -> refuse vault_key_expired
        m charge - 100                  -> refuse vault_key_expired
        key n client
        n charge a 600                  -> refuse outcome_unknown   # time ends nothing
        n charge - 100                  -> send -
        answer - silence                -> doubt 1.00
        n charge - 100                  -> send -             # a call without a name is never the same
        sum k                           -> doubt 6.00 calls 1
        ",
    )
    .await;
}

pub(super) async fn what_ends_a_doubt_and_what_does_not(world: World) {
    check(
        world,
        "
        key k
        k charge a 600                  -> send a
        answer a silence                -> doubt 6.00
        k charge a 600                  -> send a again
        answer a invalid                -> doubt 6.00
        k charge a 600                  -> send a again
        answer a throttled              -> doubt 6.00
        k charge a 600                  -> send a again
        answer a own_key                -> doubt 6.00
        k charge a 600                  -> send a again
        answer a mismatch               -> doubt 6.00
        k charge a 600                  -> send a again
        answer a not_sent               -> doubt 6.00
        k charge a 600                  -> send a again
        answer a unclear replayed       -> doubt 6.00
        k charge a 600                  -> send a again
        answer a invalid replayed       -> void 6.00
        k charge a 600                  -> send a
        answer a silence                -> doubt 6.00
        k charge a 600                  -> send a again
        answer a declined               -> void 6.00
        k charge a 600                  -> send a
        answer a silence                -> doubt 6.00
        k charge a 600                  -> send a again
        answer a moved 600 ch_a         -> spent 6.00
        call a                          -> spent 1:refused 2:declined 3:spent
        k charge a 600                  -> replay
        sum k                           -> spent 6.00 calls 1
        key c content
        c charge x 100                  -> send kb:1
        answer x mismatch               -> doubt 1.00
        ",
    )
    .await;
}

pub(super) async fn a_restart_makes_doubts(world: World) {
    check(
        world,
        "
        key k
        key l
        k charge a 600                  -> send a
        k intent b 300                  -> send b
        answer b pending 300 pi_b       -> open 3.00
        l capture c pi_b                -> send c
        restart
        sum k                           -> doubt 9.00 calls 2
        call a                          -> doubt 1:unknown
        call c                          -> doubt 1:unknown
        call b                          -> open 1:open
        k charge a 600                  -> send a again
        restart
        k charge a 600                  -> send a again
        answer a moved 600 ch_a         -> spent 6.00
        restart
        k charge a 600                  -> replay
        l capture d pi_b                -> refuse idempotency_key_in_use
        l capture c pi_b                -> send c again
        answer c moved 300 pi_b         -> spent 3.00
        sum k                           -> spent 9.00 calls 2
        sum l                           -> nothing
        ",
    )
    .await;
}

pub(super) async fn a_declined_call_is_made_anew(world: World) {
    check(
        world,
        "
        key k daily=10
        k charge a 600                  -> send a
        answer a declined               -> void 6.00
        k charge b 600                  -> send b
        k charge a 600                  -> refuse spend_cap_exceeded daily   # judged anew
        answer b not_moved              -> void 6.00
        k charge a 600                  -> send a
        answer a moved 600 ch_a         -> spent 6.00
        call a                          -> spent 1:declined 2:spent
        call b                          -> declined 1:declined
        ",
    )
    .await;
}

pub(super) async fn declined_content_gets_a_next_attempt(world: World) {
    check(
        world,
        "
        key k content
        k charge a 600                  -> send kb:1
        answer a declined               -> void 6.00
        pass 59m
        k charge a 600                  -> send kb:1          # Stripe repeats what it said
        answer a declined replayed      -> void 6.00
        k charge a 600 source=new       -> send kb:2          # a new card at once
        answer a declined               -> void 6.00
        pass 60m
        k charge a 600 source=new       -> send kb:3
        answer a silence                -> doubt 6.00
        k charge a 600                  -> refuse idempotency_error source
        k charge a 600 source=new       -> send kb:3 again
        answer a moved 600 ch_a         -> spent 6.00
        call a                          -> spent 1:declined 2:declined 3:spent
        k charge a 600 source=new       -> replay
        sum k                           -> spent 6.00 calls 1
        ",
    )
    .await;
}

pub(super) async fn content_keeps_its_attempt_until_stripe_looked(world: World) {
    check(
        world,
        "
        key k content
        k charge a 600                  -> send kb:1
        answer a not_sent               -> void 6.00
        k charge a 600                  -> send kb:1
        answer a throttled              -> void 6.00
        k charge a 700                  -> send kb:1
        answer a own_key                -> void 7.00
        k charge a 600                  -> send kb:1
        answer a invalid                -> void 6.00
        k charge a 600                  -> send kb:2
        answer a moved 600 ch_a         -> spent 6.00
        ",
    )
    .await;
}

/// Each repeated 402 began the hour anew, so that a flow which retries more often never got its next attempt. And a
/// retry that never left made the attempt look new: other parameters then went up under a key that Stripe had seen with
/// the old ones, and its `idempotency_error` became a doubt that nobody could end.
pub(super) async fn a_declined_attempt_stays_declined(world: World) {
    check(
        world,
        "
        key k content
        k charge a 600                  -> send kb:1
        answer a declined               -> void 6.00
        pass 30m
        k charge a 600                  -> send kb:1
        answer a declined replayed      -> void 6.00
        pass 20m
        k charge a 600                  -> send kb:1
        answer a not_sent               -> void 6.00
        k charge a 600 source=new       -> send kb:2
        answer a declined               -> void 6.00
        pass 30m
        k charge a 600 source=new       -> send kb:2
        answer a throttled              -> void 6.00
        k charge a 600 source=new       -> send kb:2
        answer a declined replayed      -> void 6.00
        pass 30m
        k charge a 600 source=new       -> send kb:3
        answer a not_sent               -> void 6.00
        k charge a 600                  -> send kb:3
        answer a moved 600 ch_a         -> spent 6.00
        call a                          -> spent 1:not_executed 2:declined 3:spent
        ",
    )
    .await;
}

pub(super) async fn eight_attempts_of_content(world: World) {
    use std::fmt::Write as _;
    let mut table = "key k content\n".to_owned();
    for n in 1..=8 {
        writeln!(table, "k charge a {n} -> send kb:{n}\n answer a declined -> void 0.0{n}").unwrap();
    }
    table.push_str("k charge a 9 -> refuse idempotency_error amount\n pass 60m\n k charge a 8 -> send kb:8");
    check(world, &table).await;
}

pub(super) async fn more_than_was_held_closes_the_key(world: World) {
    check(
        world,
        "
        key k daily=10
        key l daily=10
        k charge b 300                  -> send b
        k charge a 600                  -> send a
        answer a moved 700 ch_a         -> spent 7.00
        status k                        -> closed
        k charge c 1                    -> refuse vault_key_closed
        k charge a 600                  -> refuse vault_key_closed
        answer b moved 300 ch_b         -> spent 3.00         # what was under way is settled
        l charge a 600                  -> replay
        sum k                           -> spent 10.00 calls 2
        l intent d 300                  -> send d
        answer d pending 300 pi_d       -> open 3.00
        key m
        m capture e pi_d                -> send e
        answer e moved 400 pi_d         -> spent 4.00
        status l                        -> closed             # who pays is closed, not who captures
        status m                        -> active
        restart
        status l                        -> closed
        ",
    )
    .await;
}

pub(super) async fn one_hold_from_creation_to_its_end(world: World) {
    check(
        world,
        "
        key k daily=10
        key l daily=1
        key p daily=10 per_request=2
        k intent a 600                  -> send a
        answer a pending 600 pi_a       -> open 6.00
        p confirm b pi_a                -> refuse spend_cap_exceeded per_request
        l confirm b pi_a                -> send b
        answer b pending 600 pi_a ch_a  -> open 6.00
        sum k                           -> held 6.00 calls 1
        sum l                           -> nothing
        l confirm b pi_a                -> replay
        pass 24h
        l capture c ch_a                -> send c             # by the charge that stands for it
        answer c moved 600 pi_a         -> spent 6.00
        sum k                           -> spent 6.00 calls 1
        sum k today                     -> nothing            # the day of admission
        call a                          -> spent 1:open
        k intent a 600                  -> replay
        k intent d 600                  -> send d
        k capture e pi_z                -> look
        ",
    )
    .await;
}

pub(super) async fn a_partial_capture_books_what_was_taken(world: World) {
    check(
        world,
        "
        key k daily=10
        k charge a 1000 capture=false   -> send a
        answer a pending 1000 ch_a      -> open 10.00
        k capture b ch_a 400            -> send b
        sum k                           -> held 10.00 calls 1
        answer b moved 400 ch_a         -> spent 4.00
        sum k                           -> spent 4.00 calls 1
        k charge c 600                  -> send c
        ",
    )
    .await;
}

pub(super) async fn an_increment_costs_its_difference(world: World) {
    check(
        world,
        "
        key k daily=10
        key l daily=1 per_request=2
        k intent a 600                  -> send a
        answer a pending 600 pi_a       -> open 6.00
        l increment b pi_a 801          -> refuse spend_cap_exceeded per_request
        l increment b pi_a 800          -> send b
        sum k                           -> held 8.00 calls 1
        answer b pending 800 pi_a       -> open 8.00
        k increment c pi_a 1001         -> refuse spend_cap_exceeded daily
        k increment c pi_a 1000         -> send c
        answer c pending 1000 pi_a      -> open 10.00
        l increment b pi_a 800          -> replay
        k capture d pi_a                -> send d
        answer d moved 1000 pi_a        -> spent 10.00
        sum l                           -> nothing
        ",
    )
    .await;
}

pub(super) async fn a_refused_increment_is_taken_back(world: World) {
    check(
        world,
        "
        key k daily=10
        k intent a 600                  -> send a
        answer a pending 600 pi_a       -> open 6.00
        k increment b pi_a 900          -> send b
        answer b invalid                -> open 6.00
        k increment b pi_a 900          -> send b
        answer b declined               -> open 6.00
        k increment c pi_a 1000         -> send c
        answer c silence                -> doubt 10.00
        k increment c pi_a 1000         -> send c again
        answer c invalid replayed       -> open 6.00
        k capture d pi_a                -> send d
        answer d throttled              -> open 6.00
        k capture d pi_a                -> send d
        answer d declined               -> open 6.00
        sum k                           -> held 6.00 calls 1
        ",
    )
    .await;
}

pub(super) async fn a_confirm_after_a_decline_is_held_anew(world: World) {
    check(
        world,
        "
        key k daily=10
        key l daily=6
        k intent a 600                  -> send a
        answer a pending 600 pi_a       -> open 6.00
        k confirm b pi_a                -> send b
        answer b declined pi_a ch_1     -> void 6.00
        sum k                           -> nothing
        k charge c 500                  -> send c
        k confirm d pi_a                -> look               # nothing is held: its record tells
        record pi_a 600
        k confirm d pi_a                -> refuse spend_cap_exceeded daily
        l confirm d pi_a                -> send d
        answer d moved 600 pi_a ch_2    -> spent 6.00
        sum l                           -> spent 6.00 calls 1
        sum k                           -> held 5.00 calls 1
        call a                          -> spent 1:open
        k intent a 600                  -> replay
        k confirm b pi_a                -> refuse spend_cap_exceeded daily
        ",
    )
    .await;
}

pub(super) async fn a_busy_object_takes_no_second_call(world: World) {
    check(
        world,
        "
        key k
        k intent a 600                  -> send a
        answer a pending 600 pi_a       -> open 6.00
        k confirm b pi_a                -> send b
        k confirm c pi_a                -> refuse idempotency_key_in_use
        answer b silence                -> doubt 6.00
        k capture c pi_a                -> refuse idempotency_key_in_use
        k confirm b pi_a                -> send b again
        answer b pending 600 pi_a       -> open 6.00
        k capture c pi_a                -> send c
        ",
    )
    .await;
}

pub(super) async fn a_cancel_ends_open_and_doubtful_holds(world: World) {
    check(
        world,
        "
        key k
        k intent a 600                  -> send a
        answer a pending 600 pi_a       -> open 6.00
        observe pi_a ended              -> void 6.00
        call a                          -> not_executed 1:not_executed
        sum k                           -> nothing
        observe pi_a ended              -> void 6.00
        k intent b 500                  -> send b
        answer b pending 500 pi_b       -> open 5.00
        k confirm c pi_b                -> send c
        observe pi_b ended              -> sending 5.00       # its own answer ends it
        answer c silence                -> doubt 5.00
        restart
        observe pi_b ended              -> void 5.00
        call b                          -> not_executed 1:not_executed
        call c                          -> not_executed 1:not_executed
        sum k                           -> nothing
        k intent d 400                  -> send d
        answer d pending 400 pi_d       -> open 4.00
        observe pi_d moved 150          -> spent 1.50
        k intent d 400                  -> replay
        observe pi_z ended              -> nothing
        sum k                           -> spent 1.50 calls 1
        ",
    )
    .await;
}

/// In `content` mode a call on an object that ended kept its attempt, so the same upstream key went out and Stripe
/// replayed the dead object, whose hold then stayed open. What Stripe has looked at needs the next attempt.
pub(super) async fn a_call_on_a_canceled_object_is_a_new_one(world: World) {
    check(
        world,
        "
        key k
        key c content
        k intent a 600                  -> send a
        answer a pending 600 pi_a       -> open 6.00
        observe pi_a ended              -> void 6.00
        k intent a 600                  -> send a
        answer a pending 600 pi_b       -> open 6.00
        c intent x 600                  -> send kb:1
        answer x pending 600 pi_x       -> open 6.00
        c confirm x pi_x                -> send kb:2
        answer x silence                -> doubt 6.00
        observe pi_x ended              -> void 6.00
        record pi_x 600
        c confirm x pi_x                -> send kb:3
        answer x invalid                -> void 6.00
        c intent x 600                  -> send kb:4
        answer x pending 600 pi_y       -> open 6.00
        ",
    )
    .await;
}

/// A caller's key that was refused on one object may be used for another. The first object's end then ended the call
/// on the second, whose doubt could be sent again as a new call, long after Stripe had forgotten its key.
pub(super) async fn a_key_used_for_another_object_keeps_its_own_hold(world: World) {
    check(
        world,
        "
        key k
        k intent a 600                  -> send a
        answer a pending 600 pi_a       -> open 6.00
        k confirm b pi_a                -> send b
        answer b invalid                -> open 6.00
        k charge b 500                  -> send b
        answer b silence                -> doubt 5.00
        observe pi_a ended              -> void 6.00
        call b                          -> doubt 1:refused 2:unknown
        sum k                           -> doubt 5.00 calls 1
        pass 30h
        k charge b 500                  -> refuse outcome_unknown
        k intent c 600                  -> send c
        answer c pending 600 pi_c       -> open 6.00
        k confirm d pi_c                -> send d
        answer d invalid                -> open 6.00
        k charge d 500 capture=false    -> send d
        answer d pending 500 ch_d       -> open 5.00
        k capture e pi_c                -> send e
        answer e moved 600 pi_c         -> spent 6.00
        call d                          -> open 1:refused 2:open
        ",
    )
    .await;
}

/// A doubt that Stripe's record shows to be executed has no answer to replay. It was taken for a call whose time is
/// over, and made again.
pub(super) async fn a_doubt_found_executed_is_not_made_again(world: World) {
    check(
        world,
        "
        key k
        key c content
        k intent a 600                  -> send a
        answer a pending 600 pi_a       -> open 6.00
        k confirm b pi_a                -> send b
        answer b silence                -> doubt 6.00
        pass 30h
        observe pi_a moved 600          -> spent 6.00
        k confirm b pi_a                -> tell pi_a
        k intent a 600                  -> replay
        pass 30d
        tick
        key l
        l confirm b pi_a                -> tell pi_a
        pass 10d
        tick
        l confirm b pi_a                -> look               # its time is over like any other's
        ",
    )
    .await;
}

/// Only the last calls of a hold are listed with it; the one that made the object must not fall off the list, or it
/// would be replayed for ever after the object's end.
pub(super) async fn sixteen_calls_on_one_object(world: World) {
    use std::fmt::Write as _;
    let mut table = "
        key k
        k intent a 100                  -> send a
        answer a pending 100 pi_a       -> open 1.00
        "
    .to_owned();
    for n in 1..=20 {
        let (total, shown) = (100 + n, format!("1.{n:02}"));
        writeln!(table, "k increment b{n} pi_a {total} -> send b{n}").unwrap();
        writeln!(table, "answer b{n} pending {total} pi_a -> open {shown}").unwrap();
    }
    table.push_str("observe pi_a ended -> void 1.20\n call a -> not_executed 1:not_executed");
    check(world, &table).await;
}

pub(super) async fn refunds_of_known_objects(world: World) {
    check(
        world,
        "
        key k out=100
        k refund r ch_z 100             -> look
        k charge a 600                  -> send a
        answer a moved 600 ch_a         -> spent 6.00
        k refund r ch_a 200             -> send r
        answer r pending 200 re_r       -> open 2.00
        k refund r ch_a 200             -> replay
        observe re_r moved 200          -> spent 2.00
        k refund s ch_a 200             -> send s
        answer s moved 200 re_s         -> spent 2.00
        sum k out                       -> spent 4.00 calls 2
        sum k                           -> spent 6.00 calls 1
        k capture c ch_a                -> look               # the charge is still the charge's
        record ch_a 600 moved=600
        k capture c ch_a                -> send c
        ",
    )
    .await;
}

pub(super) async fn unpriced_calls_need_an_uncapped_key(world: World) {
    check(
        world,
        "
        key k
        key u uncapped max_calls=1
        k unpriced a                    -> refuse amount_unknown
        u unpriced a                    -> send a
        answer a moved 0 po_1           -> spent 0.00
        u unpriced a                    -> replay
        u unpriced b                    -> refuse call_limit_exceeded
        sum u                           -> calls 1
        k capture c po_1                -> look
        ",
    )
    .await;
}

pub(super) async fn remembered_for_remember_days(world: World) {
    check(
        world,
        "
        key k remember=2
        k charge a 600                  -> send a
        pass 1h
        answer a moved 600 ch_a         -> spent 6.00
        pass 47h
        tick
        k charge a 600                  -> replay
        pass 1h
        k charge a 700                  -> send a             # a new call, without a tick
        answer a moved 700 ch_b         -> spent 7.00
        call a                          -> spent 1:spent
        k charge a 700                  -> replay
        sum k                           -> spent 13.00 calls 2
        pass 2d
        tick
        call a                          -> gone
        k charge a 800                  -> send a
        k charge b 100                  -> send b
        answer b declined               -> void 1.00
        pass 1d
        tick
        call b                          -> declined 1:declined
        pass 1d
        tick
        call b                          -> gone
        k charge b 100                  -> send b
        ",
    )
    .await;
}

pub(super) async fn content_is_known_long_after(world: World) {
    check(
        world,
        "
        key k content remember=2
        k charge a 600                  -> send kb:1
        answer a moved 600 ch_a         -> spent 6.00
        pass 2d
        k charge a 600                  -> refuse already_executed
        k charge a 700                  -> refuse already_executed
        tick
        k charge a 600                  -> refuse already_executed
        k charge a 700                  -> refuse already_executed
        pass 399d
        tick
        key l content remember=2
        l charge a 600                  -> refuse already_executed
        pass 1d
        tick
        l charge a 600                  -> send kb:1
        ",
    )
    .await;
}

pub(super) async fn what_is_open_is_remembered_and_kept(world: World) {
    check(
        world,
        "
        key k remember=1
        k intent a 600                  -> send a
        answer a pending 600 pi_a       -> open 6.00
        k charge b 100                  -> send b
        answer b silence                -> doubt 1.00
        pass 30d
        tick
        pass 470d
        tick
        tick
        status k                        -> expired            # money still counts on it
        sum k                           -> held 6.00 doubt 1.00 calls 2
        key l remember=1
        l intent a 600                  -> replay
        l charge b 100                  -> refuse outcome_unknown
        l capture c pi_a                -> send c
        restart
        l capture c pi_a                -> send c again
        answer c moved 600 pi_a         -> spent 6.00
        l intent a 600                  -> send a             # over since long
        ",
    )
    .await;
}

pub(super) async fn rows_go_when_their_time_has_come(world: World) {
    let key = world.key("k", |key| key.remember_days = 2).await;
    let call = world.charged(key, "a", 100).await;
    let hold = world.call(call).hold_id;
    world.pass(2 * DAY_MS);
    world.ledger().tick().await.unwrap();
    assert!(world.reads().call_by_id(call).unwrap().is_none(), "its call");
    assert_eq!(world.reads().calls(&CallFilter::default(), None, 9).unwrap().items, []);
    world.pass(31 * DAY_MS - 1);
    world.ledger().tick().await.unwrap();
    assert_eq!(world.total(key, Lane::In).spent, usd("1.00"), "its key's counters");
    world.pass(1);
    world.ledger().tick().await.unwrap();
    assert!(world.reads().key(key).unwrap().is_none(), "its key");
    assert!(world.reads().key_by_digest(&digest_of(&world, key)).unwrap().is_none(), "its digest");
    assert_eq!(world.total(key, Lane::In).spent, MicroUsd::ZERO);
    assert!(world.reads().hold(hold).unwrap().is_some(), "its hold");
    world.pass(400 * DAY_MS);
    world.ledger().tick().await.unwrap();
    assert!(world.reads().hold(hold).unwrap().is_none(), "its hold, at the end");
    let other = world.key("l", |key| key.caps.daily_out = Some(usd("5.00"))).await;
    let refund = Ask {
        deed: crate::ledger::world::Deed::Refund,
        object: Some("ch_a".to_owned()),
        ..Ask::charge("r", 1)
    };
    let admitted = world.admit(other, &refund).await.unwrap();
    assert!(
        matches!(admitted, Admitted::Look(_)),
        "a refund of an object that is not known any more: {admitted:?}"
    );
    world.check();
}

fn digest_of(world: &World, key: KeyId) -> [u8; 32] {
    let issued = world.log().iter().filter(|record| record["event"] == "key_issued").count();
    assert!(issued > 0);
    let mut digest = [0; 32];
    digest[..10].copy_from_slice(&key.as_bytes()[6..]);
    digest
}

/// The hold of an object outlives the row of the key that paid for it. A cancel of that object was an error then, as if
/// the ledger contradicted itself.
pub(super) async fn a_late_cancel_of_a_dead_keys_object_is_no_error(world: World) {
    check(
        world,
        "
        key k remember=1 lives=1h
        k intent a 600                  -> send a
        answer a declined pi_a          -> void 6.00
        pass 2d
        tick
        status k                        -> gone
        observe pi_a ended              -> void 6.00
        ",
    )
    .await;
}

pub(super) async fn dead_keys_move_nothing(world: World) {
    check(
        world,
        "
        key k lives=1h
        key l
        k charge a 100                  -> send a
        answer a moved 100 ch_a         -> spent 1.00
        k charge b 100                  -> send b
        l charge c 100                  -> send c
        revoke l
        l charge d 100                  -> refuse vault_key_revoked
        answer c moved 100 ch_c         -> spent 1.00
        l charge c 100                  -> refuse vault_key_revoked
        pass 1h
        k charge a 100                  -> refuse vault_key_expired
        answer b silence                -> doubt 1.00
        k charge b 100                  -> refuse vault_key_expired
        sum k                           -> spent 1.00 doubt 1.00 calls 2
        ",
    )
    .await;
}

pub(super) async fn the_kill_switch_stops_and_survives(mut world: World) {
    let key = world.key("k", |_| ()).await;
    world.charged(key, "a", 100).await;
    let held = world.held(key, &Ask::charge("b", 100)).await;
    world.ledger().set_kill_switch(true, "drill".to_owned(), admin()).await.unwrap();
    let refused = async |world: &World, name: &str| match world.admit(key, &Ask::charge(name, 100)).await {
        Ok(Admitted::Refused(refusal)) => refusal.code == Code::KillSwitch,
        _ => false,
    };
    assert!(refused(&world, "a").await, "a replay");
    assert!(refused(&world, "c").await);
    let resolve = world.resolve(Outcome::Spent { minor: 100 }, &["ch_b"], Some(200));
    world.ledger().resolve(held, resolve).await.unwrap();
    world.restart();
    assert!(refused(&world, "c").await);
    assert_eq!(world.reads().kill_switch().unwrap().unwrap().reason, "drill");
    world.ledger().set_kill_switch(false, "over".to_owned(), admin()).await.unwrap();
    assert!(world.reads().kill_switch().unwrap().is_none());
    let _held = world.held(key, &Ask::charge("c", 100)).await;
    assert_eq!(world.total(key, Lane::In).counted(), usd("3.00"));
}

pub(super) async fn keys_are_listed_and_revoked(world: World) {
    let mut keys = Vec::new();
    for n in 0..5 {
        keys.push(world.key(if n % 2 == 0 { "even" } else { "odd" }, |_| ()).await);
    }
    let now = world.ledger().now();
    let revoked = world.ledger().revoke_key(keys[1], admin()).await.unwrap();
    world.pass(1_000);
    let again = world.ledger().revoke_key(keys[1], admin()).await.unwrap();
    assert_eq!(revoked, again, "revoking twice is the same as once");
    let nobody = KeyId::from_bytes([9; 16]);
    assert!(matches!(world.ledger().revoke_key(nobody, admin()).await, Err(LedgerError::NotFound)));
    let list = |filter: KeyFilter| {
        let (mut ids, mut after) = (Vec::new(), None);
        loop {
            let page = world.reads().keys(&filter, after, 2, now).unwrap();
            ids.extend(page.items.iter().map(|key| key.id));
            after = page.next;
            if after.is_none() {
                return ids;
            }
        }
    };
    let newest_first: Vec<KeyId> = keys.iter().rev().copied().collect();
    assert_eq!(list(KeyFilter::default()), newest_first);
    let odd = KeyFilter { label: Some("odd".to_owned()), ..KeyFilter::default() };
    assert_eq!(list(odd), [keys[3], keys[1]]);
    let revoked = KeyFilter { status: Some(Status::Revoked), ..KeyFilter::default() };
    assert_eq!(list(revoked), [keys[1]]);
}

pub(super) async fn the_clock_never_goes_back(mut world: World) {
    let key = world.key("k", |key| key.caps.daily = Some(usd("1.00"))).await;
    world.pass(DAY_MS);
    world.charged(key, "a", 100).await;
    let mark = world.ledger().now();
    world.set_clock(START);
    assert_eq!(world.ledger().now(), mark);
    let refused = async |world: &World| {
        matches!(world.admit(key, &Ask::charge("b", 100)).await, Ok(Admitted::Refused(_)))
    };
    assert!(refused(&world).await, "the day before is over");
    world.restart();
    assert_eq!(world.ledger().now(), mark, "nor over a restart");
    assert!(refused(&world).await);
    // Time in which nothing was recorded counts as well.
    world.set_clock(mark.plus_millis(5 * HOUR_MS));
    world.ledger().tick().await.unwrap();
    world.set_clock(START);
    world.restart();
    assert_eq!(world.ledger().now(), mark.plus_millis(5 * HOUR_MS));
    let (before, after) = world.ledger().lower_clock("was wrong".to_owned(), admin()).await.unwrap();
    assert_eq!((before, after), (mark.plus_millis(5 * HOUR_MS), START));
    assert_eq!(world.ledger().now(), START);
    world.restart();
    assert_eq!(world.ledger().now(), START);
    world.check();
}

/// With the mark lowered, the first send of a doubt can lie in the future. Its 23 hours then seemed to begin anew, and
/// the call was sent again long after Stripe had forgotten its key.
pub(super) async fn a_lowered_clock_opens_no_resend(world: World) {
    let key = world.key("k", |key| key.expires_at = START.plus_millis(60 * DAY_MS)).await;
    world.set_clock(START.plus_millis(20 * DAY_MS));
    in_doubt(&world, key, "a").await;
    world.set_clock(START);
    world.ledger().lower_clock("was wrong".to_owned(), admin()).await.unwrap();
    in_doubt(&world, key, "b").await;
    world.pass(HOUR_MS);
    assert!(!may_be_sent_again(&world, key, "a").await);
    assert!(may_be_sent_again(&world, key, "b").await, "first sent by the right clock");
    world.pass(20 * DAY_MS);
    assert!(!may_be_sent_again(&world, key, "a").await, "its time comes again");
}

/// While the mark is held above the machine's clock, the ledger's time stands still. A doubt could be sent again for as
/// long as that, days after Stripe had forgotten its key.
pub(super) async fn a_clock_that_is_set_back_opens_no_resend(mut world: World) {
    let key = world.key("k", |_| ()).await;
    world.pass(5 * DAY_MS);
    in_doubt(&world, key, "a").await;
    world.set_clock(START.plus_millis(DAY_MS));
    in_doubt(&world, key, "b").await;
    world.pass(3 * DAY_MS);
    world.restart();
    assert!(!may_be_sent_again(&world, key, "a").await);
    assert!(!may_be_sent_again(&world, key, "b").await);
    world.pass(DAY_MS + HOUR_MS);
    assert!(!may_be_sent_again(&world, key, "a").await, "not when the clock has caught up either");
    assert!(!may_be_sent_again(&world, key, "b").await);
    in_doubt(&world, key, "c").await;
    world.pass(HOUR_MS);
    assert!(may_be_sent_again(&world, key, "c").await);
}

async fn in_doubt(world: &World, key: KeyId, name: &str) {
    let held = world.held(key, &Ask::charge(name, 100)).await;
    world.ledger().resolve(held, world.resolve(Outcome::Unknown, &[], None)).await.unwrap();
}

async fn may_be_sent_again(world: &World, key: KeyId, name: &str) -> bool {
    match world.admit(key, &Ask::charge(name, 100)).await.unwrap() {
        Admitted::Refused(refusal) => {
            assert_eq!((refusal.code, refusal.retry), (Code::OutcomeUnknown, false));
            false
        }
        Admitted::Held(held) => {
            world.ledger().resolve(held, world.resolve(Outcome::Unknown, &[], None)).await.unwrap();
            true
        }
        Admitted::Replay { .. } | Admitted::Look(_) | Admitted::Elsewhere | Admitted::Tell(_) => {
            panic!("{name} has no answer")
        }
    }
}

pub(super) async fn a_ledger_is_bound_once(mut world: World) {
    assert_eq!(world.reads().binding().unwrap().account, None);
    let account = estate().account;
    world.ledger().bind(account.clone(), [1; 32]).await.unwrap();
    let rotated = world.ledger().bind(account.clone(), [2; 32]).await.unwrap();
    assert_eq!(rotated.verified_key.map(<[u8; 32]>::from), Some([2; 32]));
    let elsewhere = world.ledger().bind("acct_2".to_owned(), [3; 32]).await;
    assert!(matches!(elsewhere, Err(LedgerError::BoundElsewhere { .. })), "{elsewhere:?}");
    let id = world.ledger().id();
    let other_mode = world.restart_with(|opening| opening.mode = Mode::Live);
    assert!(matches!(other_mode, Err(LedgerError::BoundElsewhere { .. })), "{other_mode:?}");
    world.restart();
    assert_eq!((world.ledger().id(), world.reads().binding().unwrap()), (id, rotated));
    let bound = world.log().iter().filter(|record| record["event"] == "account_bound").count();
    assert_eq!(bound, 1);
}

pub(super) async fn equal_refusals_are_counted(world: World) {
    let key = world.key("k", |key| key.caps.daily = Some(usd("1.00"))).await;
    let other = world.key("l", |_| ()).await;
    let no = || Refusal::new(Code::EndpointNotAllowed, "no");
    let facts = || Facts { request_id: "req_1".to_owned(), ..Facts::default() };
    for _ in 0..4 {
        assert!(matches!(world.admit(key, &Ask::charge("a", 200)).await, Ok(Admitted::Refused(_))));
        world.ledger().refused(key, facts(), no(), 3).await.unwrap();
    }
    world.ledger().refused(other, facts(), no(), 3).await.unwrap();
    let counted = |world: &World| {
        let refused = world.log().into_iter().filter(|record| record["event"] == "refused");
        let told = |record: Map<String, Value>| {
            let code = record["code"].as_str().unwrap().to_owned();
            (record["label"].as_str().unwrap().to_owned(), code, record["count"].as_u64().unwrap())
        };
        refused.map(told).collect::<Vec<_>>()
    };
    let row = |label: &str, code: &str, count| (label.to_owned(), code.to_owned(), count);
    let (cap, scope) = ("spend_cap_exceeded", "endpoint_not_allowed");
    let first = vec![row("k", cap, 1), row("k", scope, 1), row("l", scope, 1)];
    assert_eq!(counted(&world), first, "the first of each at once");
    world.ledger().tick().await.unwrap();
    assert_eq!(counted(&world), first, "the minute is not over");
    world.pass(60_000);
    world.ledger().tick().await.unwrap();
    let all = [first, vec![row("k", scope, 3), row("k", cap, 3)]].concat();
    assert_eq!(counted(&world), all);
    world.pass(60_000);
    world.ledger().tick().await.unwrap();
    assert_eq!(counted(&world), all);
    world.check();
}

pub(super) async fn one_row_for_each_call(world: World) {
    let key = world.key("k", |_| ()).await;
    world.charged(key, "a", 100).await;
    let held = world.held(key, &Ask::charge("b", 200)).await;
    world.ledger().resolve(held, world.resolve(Outcome::Unknown, &[], Some(500))).await.unwrap();
    assert!(matches!(world.admit(key, &Ask::charge("a", 100)).await, Ok(Admitted::Replay { .. })));
    world.record(Entry { event: Event::Forwarded, ..Entry::default() }).await;
    for index_follows in [false, true] {
        if index_follows {
            world.ledger().tick().await.unwrap();
        }
        let told = |record: &Map<String, Value>| {
            (record["event"].as_str().unwrap().to_owned(), record["outcome"].as_str().map(str::to_owned))
        };
        let rows = |filter: &AuditFilter| world.audit(filter).iter().map(told).collect::<Vec<_>>();
        let row = |event: &str, outcome: Option<&str>| (event.to_owned(), outcome.map(str::to_owned));
        let newest_first = [
            row("forwarded", None),
            row("replayed", Some("none")),
            row("doubt", Some("doubt")),
            row("settled", Some("spent")),
            row("key_issued", None),
            row("chain_started", None),
        ];
        assert_eq!(rows(&AuditFilter::default()), newest_first);
        let all = AuditFilter { all_events: true, ascending: true, ..AuditFilter::default() };
        assert_eq!(rows(&all).len(), 8);
        let outcome = |outcome: &str| AuditFilter {
            equal: vec![("outcome", outcome.to_owned())],
            ..AuditFilter::default()
        };
        assert_eq!(rows(&outcome("spent")), [row("settled", Some("spent"))]);
        assert_eq!(rows(&outcome("held")), [], "an earlier outcome is none");
        let customer = AuditFilter {
            equal: vec![("customer", "cus_b".to_owned())],
            within: vec![("metadata", "flow".to_owned(), "billing".to_owned())],
            ..AuditFilter::default()
        };
        assert_eq!(rows(&customer), [row("doubt", Some("doubt"))]);
    }
    let calls = |state| {
        let filter = CallFilter { state: Some(state), ..CallFilter::default() };
        world.reads().calls(&filter, None, 9).unwrap().items.len()
    };
    assert_eq!((calls(CallState::Spent), calls(CallState::Doubt), calls(CallState::Open)), (1, 1, 0));
    world.check();
}

pub(super) async fn old_records_go_and_the_chain_holds(mut world: World) {
    world.restart_with(|opening| opening.audit_days = 10).unwrap();
    let key = world.key("k", |_| ()).await;
    world.charged(key, "a", 100).await;
    world.pass(5 * DAY_MS);
    world.charged(key, "b", 100).await;
    let all = world.log();
    assert_eq!(all.len(), 6);
    world.pass(5 * DAY_MS + 1);
    world.ledger().tick().await.unwrap();
    assert_eq!(world.log(), all[4..], "chain, key and the first charge are gone");
    assert_eq!(world.reads().verify_chain().unwrap().records, 2);
    world.check();
    world.pass(30 * DAY_MS);
    world.ledger().tick().await.unwrap();
    assert_eq!(world.log(), all[5..], "the last record stays, to be continued");
    let key = world.key("l", |_| ()).await;
    world.restart_with(|opening| opening.audit_days = 10).unwrap();
    world.charged(key, "c", 100).await;
    let seqs: Vec<u64> = world.log().iter().map(|record| record["seq"].as_u64().unwrap()).collect();
    assert_eq!(seqs, [6, 7, 8, 9]);
    world.check();
}

/// A sender that was taken for dead still ends what it sent; whoever shows a hold that is over changes nothing, and
/// everybody else goes on.
pub(super) async fn a_hold_is_resolved_once(mut world: World) {
    let key = world.key("k", |_| ()).await;
    let held = world.held(key, &Ask::charge("a", 100)).await;
    let sending = held.sending();
    world.restart();
    assert_eq!(world.total(key, Lane::In).doubt, usd("1.00"));
    let late = world.resolve(Outcome::Declined, &[], Some(402));
    world.ledger().resolve(held, late).await.unwrap();
    assert_eq!(world.total(key, Lane::In).doubt, usd("0.00"));
    let again = world.ledger().doubt(sending, "req".to_owned()).await;
    assert!(matches!(again, Err(LedgerError::Contradiction(_))), "{again:?}");
    let Admitted::Held(held) = world.admit(key, &Ask::charge("c", 100)).await.unwrap() else {
        panic!("held")
    };
    world.restart();
    // Sent again meanwhile: what became of the first sending is told by the second.
    let Admitted::Held(second) = world.admit(key, &Ask::charge("c", 100)).await.unwrap() else {
        panic!("held")
    };
    let late = world.resolve(Outcome::Declined, &[], Some(402));
    let answer = world.ledger().resolve(held, late.clone()).await;
    assert!(matches!(answer, Err(LedgerError::Contradiction(_))), "{answer:?}");
    let spent = world.resolve(Outcome::Spent { minor: 100 }, &["ch_c"], Some(200));
    world.ledger().resolve(second, spent).await.unwrap();
    assert_eq!(world.total(key, Lane::In).spent, usd("1.00"));
    world.charged(key, "b", 100).await;
    assert_eq!(world.ledger().failure(), None);
    world.check();
}
