//! Amounts that a request names line by line: the price of one and a quantity.

use crate::money::{MicroUsd, parse_amount};
use crate::refusal::Refusal;
use crate::vendor::stripe::form::{self, Params};
use crate::vendor::stripe::pricing::{Answers, Price};
use crate::vendor::stripe::request::{Exchange, amount, currency, invalid, required_amount};

/// Parameters with the price of one.
const UNITS: &[&str] =
    &["unit_amount", "unit_amount_decimal", "price_data[unit_amount]", "price_data[unit_amount_decimal]"];

/// The amount that the request names, and the parameter that names it. An item of an invoice may name the price of one
/// and a quantity instead.
pub(super) fn named_amount(price: &Price, params: &Params) -> Result<Option<(u64, &'static str)>, Refusal> {
    let name = price.amount.unwrap_or("amount");
    if price.answers != Answers::InvoiceItem {
        return Ok(Some((required_amount(params, name)?, name)));
    }
    let unit = params.first_of(UNITS);
    match (amount(params, name)?, unit) {
        (Some(minor), _) => amount_alone(params).map(|()| Some((minor, name))),
        (None, None) => Ok(None),
        (None, Some((unit, text))) => {
            let quantity = amount(params, "quantity")?.unwrap_or(1);
            let minor = times(text, quantity).ok_or_else(|| {
                invalid(unit, "must be a number in the currency's smallest unit, with at most 12 decimals")
            })?;
            Ok(Some((minor, unit)))
        }
    }
}

/// Refuses whatever names an amount beside `amount`.
pub(super) fn amount_alone(params: &Params) -> Result<(), Refusal> {
    let others = ["quantity", "price", "price_data", "pricing", "unit_amount", "unit_amount_decimal"];
    let other = params.pairs().iter().find(|(name, _)| others.contains(&form::base(name)));
    match other {
        Some((name, _)) => Err(invalid(name, "must not be given with 'amount'")),
        None => Ok(()),
    }
}

/// Decimals that the price of one unit may have.
const UNIT_DECIMALS_MAX: usize = 12;

/// A decimal price of one unit times a quantity, rounded up.
fn times(unit: &str, quantity: u64) -> Option<u64> {
    let (whole, fraction) = unit.split_once('.').unwrap_or((unit, ""));
    let plain = fraction.bytes().all(|byte| byte.is_ascii_digit()) && fraction.len() <= UNIT_DECIMALS_MAX;
    let fine = if fraction.is_empty() { 0 } else { fraction.parse::<u128>().ok()? };
    let scale = 10_u128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
    let one = u128::from(parse_amount(whole)?).checked_mul(scale)?.checked_add(fine)?;
    let all = one.checked_mul(u128::from(quantity))?.div_ceil(scale);
    u64::try_from(all).ok().filter(|_| plain)
}

/// The least that a call costs by what its lines name. Prices that are named by their id are not known here.
///
/// # Errors
/// `currency_not_allowed` for a currency without a rate, `parameter_invalid` for a price that is no number.
pub(super) fn least(params: &Params, exchange: &Exchange) -> Result<MicroUsd, Refusal> {
    let mut sum = MicroUsd::ZERO;
    for (name, text) in params.pairs() {
        let mut words: Vec<&str> = form::words(name).collect();
        let leaf = words.pop().unwrap_or_default();
        if words.contains(&"metadata") || form::base(name) == "metadata" {
            continue;
        }
        if leaf == "currency" {
            currency(params, name, exchange)?;
        }
        let is_price = ["unit_amount", "unit_amount_decimal"].contains(&leaf)
            || (leaf == "amount" && form::base(name) == "lines");
        // A negative one takes from what is owed.
        if !is_price || text.starts_with('-') {
            continue;
        }
        let line = name.strip_suffix(&format!("[{leaf}]")).unwrap_or_default();
        let of = line.strip_suffix("[price_data]").unwrap_or(line);
        let quantity = if leaf == "amount" { None } else { amount(params, &format!("{of}[quantity]"))? };
        let minor = times(text, quantity.unwrap_or(1))
            .ok_or_else(|| invalid(name, "must be a number in the currency's smallest unit"))?;
        let own = format!("{line}[currency]");
        let in_currency = if params.get(&own).is_some() { own.as_str() } else { "currency" };
        if params.get(in_currency).is_none() {
            continue;
        }
        let (_, rate) = currency(params, in_currency, exchange)?;
        let usd = rate.usd(minor).and_then(|usd| sum.checked_add(usd));
        sum = usd.ok_or_else(|| invalid(name, "is too large to be counted"))?;
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_price_times_a_quantity_rounds_up() {
        for (unit, quantity, minor) in [
            ("500", 2, Some(1_000)),
            ("0.5", 3, Some(2)),
            ("399.5", 2, Some(799)),
            ("0.000000000001", 1, Some(1)),
            ("999999999999", 1, Some(999_999_999_999)),
            ("0", 7, Some(0)),
            ("0.0000000000001", 1, None),
            ("5.", 1, Some(5)),
            ("-5", 1, None),
            ("+5", 1, None),
            (".5", 1, None),
            ("5.x", 1, None),
            ("1e3", 1, None),
            ("05", 1, None),
            ("999999999999", u64::MAX, None),
        ] {
            assert_eq!(times(unit, quantity), minor, "{unit} x {quantity}");
        }
    }

    #[test]
    fn what_lines_name_is_the_least_that_a_call_costs() {
        let told = |text: &str| {
            let params = Params::parse(text.as_bytes()).unwrap();
            least(&params, &Exchange::default())
                .map(|usd| usd.to_string())
                .map_err(|refusal| (refusal.code.as_str(), refusal.param.unwrap()))
        };
        let usd = "line_items[0][price_data][currency]=usd&line_items[0][price_data][unit_amount]=1500";
        for (text, expected) in [
            ("", "0.00"),
            ("line_items[0][price]=price_1&line_items[0][quantity]=9", "0.00"),
            (usd, "15.00"),
            (&format!("{usd}&line_items[0][quantity]=3"), "45.00"),
            ("items[0][price_data][currency]=usd&items[0][price_data][unit_amount_decimal]=0.5", "0.01"),
            ("currency=usd&lines[0][amount]=700&lines[1][amount]=-300", "7.00"),
            (
                "phases[0][items][0][price_data][currency]=usd&phases[0][items][0][price_data][unit_amount]=100",
                "1.00",
            ),
            ("metadata[unit_amount]=x&subscription_data[metadata][currency]=eur", "0.00"),
        ] {
            assert_eq!(told(text), Ok(expected.to_owned()), "{text}");
        }
        for (text, code, param) in [
            (usd.replace("=usd", "=eur"), "currency_not_allowed", "line_items[0][price_data][currency]"),
            ("currency=eur".to_owned(), "currency_not_allowed", "currency"),
            (usd.replace("1500", "1e9"), "parameter_invalid", "line_items[0][price_data][unit_amount]"),
            (format!("{usd}&line_items[0][quantity]=-1"), "parameter_invalid", "line_items[0][quantity]"),
        ] {
            assert_eq!(told(&text), Err((code, param.to_owned())), "{text}");
        }
    }
}
