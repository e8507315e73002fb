import com.google.gson.GsonBuilder;
import com.stripe.StripeClient;
import com.stripe.exception.StripeException;
import com.stripe.net.RequestOptions;
import com.stripe.param.ChargeCreateParams;
import java.util.LinkedHashMap;
import java.util.Map;

/** One charge, as a Kestra Java task makes it. Java's SDK takes a base with a path: it goes to the mount of Stripe. */
public final class Charge {
  public static void main(String[] arguments) {
    Map<String, String> given = System.getenv();
    StripeClient client =
        StripeClient.builder()
            .setApiKey(given.get("STRIPE_SECRET_KEY"))
            .setApiBase(given.get("KEYBRAKE_URL") + "/stripe")
            .build();
    ChargeCreateParams params =
        ChargeCreateParams.builder()
            .setAmount(Long.parseLong(given.get("AMOUNT_CENTS")))
            .setCurrency("usd")
            .setCustomer(given.get("CUSTOMER"))
            .build();
    RequestOptions.RequestOptionsBuilder options = RequestOptions.builder();
    String key = given.getOrDefault("IDEMPOTENCY_KEY", "");
    if (!key.isEmpty()) {
      options.setIdempotencyKey(key);
    }
    Map<String, Object> told = new LinkedHashMap<>();
    try {
      com.stripe.model.Charge charge = client.v1().charges().create(params, options.build());
      told.put("id", charge.getId());
      told.put("paid", charge.getPaid());
      told.put("replayed", charge.getLastResponse().headers().firstValue("Idempotent-Replayed").orElse(null));
    } catch (StripeException error) {
      told.put("type", error.getClass().getSimpleName());
      told.put("code", error.getCode());
      told.put("message", error.getMessage());
      told.put("status", error.getStatusCode());
    }
    System.out.println(new GsonBuilder().serializeNulls().create().toJson(told));
  }
}
