//! How doubts end: by what is found at the vendor, or by an operator. And what an operator takes back.

use crate::ledger::table::check;
use crate::ledger::world::World;

pub(in crate::ledger) async fn a_doubt_ends_by_what_is_found(world: World) {
    check(
        world,
        "
        key k daily=100
        key c content daily=100
        k charge a 600                  -> send a
        found a moved 600 ch_a          -> conflict           # it is being sent
        answer a silence                -> doubt 6.00
        found a moved 600 ch_a          -> spent 6.00
        found a moved 600 ch_a          -> conflict           # once
        call a                          -> spent 1:spent
        k charge a 600                  -> tell ch_a
        k charge a 700                  -> refuse idempotency_error amount
        sum k                           -> spent 6.00 calls 1
        k charge b 600                  -> send b
        answer b silence                -> doubt 6.00
        found b moved 600 ch_a          -> of another         # one object, one charge
        found b declined 0 ch_b         -> void 6.00
        k charge b 600                  -> send b
        answer b not_sent               -> void 6.00
        k intent d 600                  -> send d
        answer d silence                -> doubt 6.00
        found d pending 600 pi_d        -> open 6.00
        k confirm e pi_d                -> send e
        answer e silence                -> doubt 6.00
        found e moved 600 pi_d          -> spent 6.00
        call d                          -> spent 1:open
        sum k                           -> spent 12.00 calls 2
        c charge x 600                  -> send kb:1
        answer x silence                -> doubt 6.00
        found x declined 0 ch_x         -> void 6.00
        c charge x 600                  -> send kb:1          # Stripe repeats its decline for a while
        answer x declined               -> void 6.00
        pass 1h
        c charge x 600                  -> send kb:2
        ",
    )
    .await;
}

pub(in crate::ledger) async fn an_operator_ends_a_doubt_either_way(world: World) {
    check(
        world,
        "
        key k daily=100
        key c content daily=100
        k charge a 600                  -> send a
        answer a silence                -> doubt 6.00
        pass 3d
        k charge a 600                  -> refuse outcome_unknown
        resolve a spent 600 ch_a        -> spent 6.00
        resolve a not_executed          -> conflict
        k charge a 600                  -> tell ch_a
        k charge b 700                  -> send b
        answer b silence                -> doubt 7.00
        resolve b not_executed          -> void 7.00
        call b                          -> not_executed 1:not_executed
        k charge b 700                  -> send b             # the same key: it is the caller's
        answer b moved 700 ch_b         -> spent 7.00
        k charge d 800                  -> send d
        answer d silence                -> doubt 8.00
        resolve d spent 900 ch_d        -> spent 9.00         # more than was held
        status k                        -> closed
        c charge x 600                  -> send kb:1
        answer x silence                -> doubt 6.00
        resolve x not_executed          -> void 6.00
        c charge x 600                  -> send kb:2          # another key: Stripe may know the first one
        answer x pending 600 ch_x       -> open 6.00
        c capture y ch_x                -> send kb:3
        answer y silence                -> doubt 6.00
        resolve y not_executed          -> open 6.00          # the authorisation stands
        sum c                           -> held 6.00 calls 1
        ",
    )
    .await;
}

pub(in crate::ledger) async fn what_is_forgotten_can_be_made_again(world: World) {
    check(
        world,
        "
        key k daily=100
        key c content daily=100
        k charge a 600                  -> send a
        forget a                        -> conflict
        answer a silence                -> doubt 6.00
        forget a                        -> conflict
        found a moved 600 ch_a          -> spent 6.00
        forget a                        -> forgotten
        forget a                        -> conflict
        k charge a 700                  -> send a             # other parameters too
        answer a moved 700 ch_b         -> spent 7.00
        c charge x 600                  -> send kb:1
        answer x moved 600 ch_x         -> spent 6.00
        c charge x 600                  -> replay
        forget x                        -> forgotten
        c charge x 600                  -> send kb:2          # the generation is part of the key
        answer x pending 600 ch_y       -> open 6.00
        forget x                        -> conflict
        sum c                           -> spent 6.00 held 6.00 calls 2
        ",
    )
    .await;
}

pub(in crate::ledger) async fn a_key_says_when_a_declined_call_is_worth_another_try(world: World) {
    check(
        world,
        "
        key k content retry_declined=60
        k charge a 600                  -> send kb:1
        answer a declined               -> void 6.00
        k charge a 600                  -> send kb:1
        answer a declined replayed      -> void 6.00
        pass 1m
        k charge a 600                  -> send kb:2
        ",
    )
    .await;
}
