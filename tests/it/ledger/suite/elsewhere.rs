//! Objects that somebody else made, calls that only the key can bound, and amounts in another currency.

use crate::ledger::table::check;
use crate::ledger::world::World;

pub(in crate::ledger) async fn an_object_made_elsewhere_is_read_before_it_is_held(world: World) {
    check(
        world,
        "
        key k daily=100 out=10
        key l daily=5
        k confirm a pi_x                -> look
        record pi_x 600
        l confirm a pi_x                -> refuse spend_cap_exceeded daily
        k confirm a pi_x                -> send a
        k confirm b pi_x                -> refuse idempotency_key_in_use
        answer a moved 600 pi_x         -> spent 6.00
        k confirm a pi_x                -> replay
        record pi_y 600 moved=400
        k capture c pi_y                -> send c
        answer c moved 1000 pi_y        -> spent 6.00         # what moved before is nobody's here
        record pi_z 600
        k capture d pi_z 200            -> send d             # no more than it names
        answer d not_sent               -> void 2.00
        k capture d pi_z                -> send d             # read anew, not what was held before
        answer d moved 600 pi_z         -> spent 6.00
        k refund f ch_w                 -> look
        record ch_w 300
        k refund f ch_w                 -> send f
        answer f moved 300 re_f         -> spent 3.00
        k refund g ch_w 100             -> send g
        sum k                           -> spent 18.00 calls 3
        sum k out                       -> spent 3.00 held 1.00 calls 2
        ",
    )
    .await;
}

pub(in crate::ledger) async fn what_can_still_be_paid_stays_held(world: World) {
    check(
        world,
        "
        key k daily=100
        record in_1 600
        k confirm a in_1                -> send a
        answer a declined               -> open 6.00
        k confirm b in_1                -> send b
        answer b moved 600 in_1         -> spent 6.00
        record pi_2 600
        k confirm c pi_2                -> send c
        answer c declined               -> void 6.00
        sum k                           -> spent 6.00 calls 1
        ",
    )
    .await;
}

pub(in crate::ledger) async fn a_ceiling_is_held_for_each_call(world: World) {
    check(
        world,
        "
        key k daily=170
        k ceiling a in_1                -> send a
        sum k                           -> held 50.00 calls 1
        k ceiling b in_1                -> refuse idempotency_key_in_use
        answer a pending 0 in_1         -> open 50.00
        k ceiling b in_1                -> send b             # on top of what it stands for
        sum k                           -> held 100.00 calls 1
        answer b invalid                -> open 50.00         # and back
        k ceiling c in_1                -> send c
        answer c moved 700 in_1         -> spent 7.00
        k ceiling d                     -> send d
        answer d silence                -> doubt 50.00
        k ceiling e                     -> send e
        k ceiling f                     -> send f
        k ceiling g                     -> refuse spend_cap_exceeded daily
        answer e moved 5100 sub_e       -> spent 51.00        # more than the key allows
        status k                        -> closed
        ",
    )
    .await;
}

pub(in crate::ledger) async fn a_hold_keeps_its_rate(world: World) {
    check(
        world,
        "
        key k daily=25
        record pi_e 1000 eur            # 2 cents of a dollar each
        k confirm a pi_e                -> send a
        sum k                           -> held 20.00 calls 1
        answer a pending 1000 pi_e      -> open 20.00
        k increment b pi_e 1300         -> refuse spend_cap_exceeded daily
        k increment c pi_e 1250         -> send c
        answer c pending 1250 pi_e      -> open 25.00
        k capture d pi_e 333            -> send d
        answer d moved 333 pi_e         -> spent 6.66
        record pi_g 100 gbp
        k confirm e pi_g                -> refuse currency_not_allowed currency
        ",
    )
    .await;
}
