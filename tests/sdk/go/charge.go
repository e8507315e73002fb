// One charge, as a Kestra Go task makes it. Go's SDK has no base path: it goes to the root of the sidecar.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"log"
	"os"
	"strconv"

	"github.com/stripe/stripe-go/v85"
)

func main() {
	amount, err := strconv.ParseInt(os.Getenv("AMOUNT_CENTS"), 10, 64)
	if err != nil {
		log.Fatal(err)
	}
	backends := stripe.NewBackendsWithConfig(&stripe.BackendConfig{URL: stripe.String(os.Getenv("KEYBRAKE_URL"))})
	client := stripe.NewClient(os.Getenv("STRIPE_SECRET_KEY"), stripe.WithBackends(backends))

	params := &stripe.ChargeCreateParams{
		Amount:   stripe.Int64(amount),
		Currency: stripe.String(stripe.CurrencyUSD),
		Customer: stripe.String(os.Getenv("CUSTOMER")),
	}
	if key := os.Getenv("IDEMPOTENCY_KEY"); key != "" {
		params.SetIdempotencyKey(key)
	}
	told := map[string]any{}
	charge, err := client.V1Charges.Create(context.Background(), params)
	var refused *stripe.Error
	switch {
	case errors.As(err, &refused):
		told["type"], told["code"] = refused.Type, refused.Code
		told["message"], told["status"] = refused.Msg, refused.HTTPStatusCode
	case err != nil:
		told["type"], told["message"] = "connection", err.Error()
	default:
		told["id"], told["paid"] = charge.ID, charge.Paid
		told["replayed"] = nil
		if replayed := charge.LastResponse.Header.Get("Idempotent-Replayed"); replayed != "" {
			told["replayed"] = replayed
		}
	}
	if err := json.NewEncoder(os.Stdout).Encode(told); err != nil {
		log.Fatal(err)
	}
}
