//! What the sidecar is meant to cost at most, as ratios within one run on two cores, both commits of a charge durable
//! before its answer.

use crate::bounds::Row;
use crate::report::{Figure, Report};

const OWN: &str = "keybrake";

pub(crate) fn goals(report: &Report) -> Vec<Row> {
    let to_nginx = |case, figure| report.ratio(case, OWN, figure);
    let added =
        |figure| report.compared("charge, 200/s", (OWN, "direct"), figure, |own, direct| own - direct);
    let to_peer = report.compared("charge, 16 kept", (OWN, "fastapi"), Figure::Rps, |own, peer| own / peer);
    vec![
        Row::at_most("GET, 1 kept: p50, × nginx", 1.2, 1.0, to_nginx("get, 1 kept", Figure::P50)),
        Row::at_most("GET, 1 kept: CPU, × nginx", 1.6, 1.2, report.cpu_ratio("get, 1 kept", OWN)),
        Row::at_most("charge, 1 kept: p50, × nginx", 6.0, 4.0, to_nginx("charge, 1 kept", Figure::P50)),
        Row::at_least("charge, 16 kept: rps, × nginx", 0.3, 0.4, to_nginx("charge, 16 kept", Figure::Rps)),
        Row::at_least("charge, 64 kept: rps, × nginx", 0.5, 0.6, to_nginx("charge, 64 kept", Figure::Rps)),
        Row::at_most("charge, 200/s: added to direct p50, ms", 1.2, 0.7, added(Figure::P50)),
        Row::at_most("charge, 200/s: added to direct p99, ms", 3.0, 2.0, added(Figure::P99)),
        Row::at_most("charge, 1 fresh: p50, × nginx", 1.6, 1.2, to_nginx("charge, 1 fresh", Figure::P50)),
        Row::at_least("charge, 16 fresh: rps, × nginx", 0.8, 1.0, to_nginx("charge, 16 fresh", Figure::Rps)),
        Row::at_least("charge, 16 kept: rps, × fastapi", 20.0, 30.0, to_peer),
        Row::at_most("idle memory, MB", 16.0, 12.0, report.idle_megabytes(OWN)),
    ]
}
