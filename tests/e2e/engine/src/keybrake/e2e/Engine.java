package keybrake.e2e;

import com.fasterxml.jackson.annotation.JsonInclude;
import com.fasterxml.jackson.databind.ObjectMapper;
import io.kestra.core.http.HttpRequest;
import io.kestra.core.http.HttpResponse;
import io.kestra.core.models.Label;
import io.kestra.core.models.executions.Execution;
import io.kestra.core.models.executions.LogEntry;
import io.kestra.core.models.executions.TaskRun;
import io.kestra.core.models.flows.Flow;
import io.kestra.core.models.flows.FlowSource;
import io.kestra.core.models.triggers.AbstractTrigger;
import io.kestra.core.models.validations.ValidateConstraintViolation;
import io.kestra.core.repositories.ExecutionRepositoryInterface;
import io.kestra.core.repositories.FlowRepositoryInterface;
import io.kestra.core.serializers.JacksonMapper;
import io.kestra.core.server.Service;
import io.kestra.core.server.ServiceType;
import io.kestra.core.services.FlowService;
import io.kestra.core.services.WebhookService;
import io.kestra.core.storages.Namespace;
import io.kestra.core.storages.NamespaceFactory;
import io.kestra.core.storages.StorageInterface;
import io.kestra.plugin.core.trigger.AbstractWebhookTrigger;
import io.kestra.plugin.core.trigger.WebhookContext;
import io.kestra.plugin.core.trigger.WebhookResponse;
import io.micronaut.context.ApplicationContext;
import io.micronaut.data.model.Pageable;
import java.io.BufferedReader;
import java.io.ByteArrayInputStream;
import java.io.IOException;
import java.io.InputStreamReader;
import java.io.PrintStream;
import java.io.UncheckedIOException;
import java.net.URI;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.time.Duration;
import java.util.ArrayList;
import java.util.Base64;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.function.Predicate;

/**
 * Kestra's released engine in one process: executor, scheduler, worker and indexer over an H2 file, without the REST
 * layer. It takes requests as JSON lines on stdin and answers each with a line on stdout, {@code {"ok": ...}} or
 * {@code {"refused": "why"}}. All else that it says goes to stderr.
 *
 * <p>It ends when stdin does or when the process that started it is gone, and then takes its scripts along. SIGTERM
 * stops the worker as Kestra's own server does; SIGKILL leaves scripts behind, as there.
 */
public final class Engine {
    static final String TENANT = "main";
    static final int WORKER_THREADS = 16;
    private static final Duration READY_WITHIN = Duration.ofSeconds(280);
    private static final Duration WEBHOOK_WITHIN = Duration.ofSeconds(20);
    private static final int EXECUTIONS_MAX = 1000;
    private static final ObjectMapper JSON = JacksonMapper.ofJson().copy().setDefaultPropertyInclusion(
        JsonInclude.Value.construct(JsonInclude.Include.ALWAYS, JsonInclude.Include.ALWAYS));

    private final ApplicationContext context;
    private final Dialect dialect;
    private final FlowService flows;
    private final FlowRepositoryInterface flowRepository;
    private final ExecutionRepositoryInterface executions;
    private final StorageInterface storage;

    public static void main(String[] arguments) {
        PrintStream answers = System.out;
        System.setOut(System.err);
        try {
            ProcessHandle.current().parent().ifPresent(parent -> parent.onExit().thenRun(Engine::abandon));
            Engine engine = new Engine(Path.of(arguments[0]), arguments[1]);
            answers.println(JSON.writeValueAsString(Map.of("ok", "ready")));
            engine.serve(answers);
            abandon();
        } catch (Throwable error) {
            error.printStackTrace();
            // Kestra's threads would keep the process alive.
            Runtime.getRuntime().halt(1);
        }
    }

    /** Runs a part of Kestra; the process ends when that fails. */
    static void thread(Runnable part) {
        Thread.ofPlatform().start(() -> {
            try {
                part.run();
            } catch (Throwable error) {
                error.printStackTrace();
                Runtime.getRuntime().halt(1);
            }
        });
    }

    /** Nobody is there any more: no script may go on either. */
    private static void abandon() {
        ProcessHandle.current().descendants().forEach(ProcessHandle::destroyForcibly);
        Runtime.getRuntime().halt(0);
    }

    private Engine(Path data, String gracePeriod) throws Exception {
        Map<String, Object> settings = Settings.common(data, gracePeriod);
        settings.putAll(Dialect.settings());
        context = ApplicationContext.builder().mainClass(Engine.class).properties(settings).start();
        dialect = new Dialect(context);
        flows = context.getBean(FlowService.class);
        flowRepository = context.getBean(FlowRepositoryInterface.class);
        executions = context.getBean(ExecutionRepositoryInterface.class);
        storage = context.getBean(StorageInterface.class);
        List<Service> services = dialect.start();
        Runtime.getRuntime().addShutdownHook(new Thread(() -> stop(services)));
        long deadline = System.nanoTime() + READY_WITHIN.toNanos();
        while (!services.stream().allMatch(Engine::runs)) {
            if (System.nanoTime() > deadline) {
                throw new IllegalStateException("not ready within " + READY_WITHIN + ": " + services.stream()
                    .map(service -> service.getType() + " " + service.getState()).toList());
            }
            Thread.sleep(20);
        }
    }

    private static boolean runs(Service service) {
        return service.getState() != null && service.getState().isRunning();
    }

    /** As a rolling restart ends a worker: it waits for its tasks until the grace is over, while the rest runs on. */
    private void stop(List<Service> services) {
        Predicate<Service> worker = service -> service.getType() == ServiceType.WORKER;
        services.stream().filter(worker).forEach(Service::close);
        services.stream().filter(worker.negate()).forEach(Service::close);
        context.close();
    }

    private void serve(PrintStream answers) throws IOException {
        BufferedReader requests = new BufferedReader(new InputStreamReader(System.in, StandardCharsets.UTF_8));
        for (String line = requests.readLine(); line != null; line = requests.readLine()) {
            Map<String, Object> answer = new LinkedHashMap<>();
            try {
                answer.put("ok", answer(JSON.readValue(line, JacksonMapper.MAP_TYPE_REFERENCE)));
            } catch (Exception refused) {
                answer.put("refused", refused.toString());
            }
            answers.println(JSON.writeValueAsString(answer));
        }
    }

    private Object answer(Map<String, Object> request) throws Exception {
        return switch (text(request, "do")) {
            case "validate" -> violations(text(request, "source"));
            case "load" -> flows.importFlow(TENANT, text(request, "source")).getRevision();
            case "put_file" -> putFile(request);
            case "run" -> run(request);
            case "webhook" -> webhook(flow(request), text(request, "key"), text(request, "body"));
            case "restart" -> dialect.restart(execution(request));
            case "replay" -> dialect.replay(execution(request), (String) request.get("task_run"));
            case "kill" -> dialect.kill(execution(request));
            case "execution" -> executions.findById(TENANT, text(request, "id")).map(this::told).orElse(null);
            case "executions" -> executionsOf(text(request, "namespace"), text(request, "flow"));
            case "logs" -> logs(execution(request));
            default -> throw new IllegalArgumentException("unknown request: " + request.get("do"));
        };
    }

    private static String text(Map<String, Object> request, String name) {
        if (request.get(name) instanceof String value) {
            return value;
        }
        throw new IllegalArgumentException("`" + name + "` is missing or no text");
    }

    private Flow flow(Map<String, Object> request) {
        String namespace = text(request, "namespace");
        String id = text(request, "flow");
        return flowRepository.findById(TENANT, namespace, id)
            .orElseThrow(() -> new IllegalArgumentException("no flow " + namespace + "." + id));
    }

    private Execution execution(Map<String, Object> request) {
        String id = text(request, "id");
        return executions.findById(TENANT, id).orElseThrow(() -> new IllegalArgumentException("no execution " + id));
    }

    private List<Map<String, Object>> executionsOf(String namespace, String flow) {
        return executions.findByFlowId(TENANT, namespace, flow, Pageable.from(1, EXECUTIONS_MAX)).stream()
            .filter(execution -> !dialect.isIteration(execution)).map(this::told).toList();
    }

    private List<String> violations(String source) {
        return flows.validate(TENANT, List.of(new FlowSource("flow.yaml", source))).stream()
            .map(ValidateConstraintViolation::getConstraints).filter(found -> found != null && !found.isBlank())
            .toList();
    }

    private Object putFile(Map<String, Object> request) throws Exception {
        byte[] content = Base64.getDecoder().decode(text(request, "content"));
        return context.getBean(NamespaceFactory.class)
            .of(TENANT, text(request, "namespace"), storage)
            .putFile(
                Path.of("/", text(request, "path")), new ByteArrayInputStream(content), Namespace.Conflicts.OVERWRITE)
            .stream().map(file -> file.uri().toString()).toList();
    }

    @SuppressWarnings("unchecked")
    private String run(Map<String, Object> request) throws Exception {
        Flow flow = flow(request);
        List<Label> labels = new ArrayList<>();
        ((Map<String, String>) request.get("labels")).forEach((name, value) -> labels.add(new Label(name, value)));
        Map<String, Object> inputs = (Map<String, Object>) request.get("inputs");
        Map<String, String> files = (Map<String, String>) request.get("files");
        return dialect.run(flow, labels, id -> {
            Map<String, Object> all = new LinkedHashMap<>(inputs);
            // Over HTTP these are parts of the request, and the REST layer stores them.
            files.forEach((name, content) -> all.put(name, stored(flow, id, name, content)));
            return all;
        });
    }

    private String stored(Flow flow, String execution, String input, String content) {
        Execution owner = Execution.builder().tenantId(TENANT).namespace(flow.getNamespace()).flowId(flow.getId())
            .id(execution).build();
        try {
            Path file = Files.createTempFile("input", null);
            Files.write(file, Base64.getDecoder().decode(content));
            try {
                return storage.from(owner, input, input, file.toFile()).toString();
            } finally {
                Files.deleteIfExists(file);
            }
        } catch (IOException error) {
            throw new UncheckedIOException(error);
        }
    }

    private String webhook(Flow flow, String key, String body) throws Exception {
        WebhookService service = context.getBean(WebhookService.class);
        AbstractWebhookTrigger hook = hook(service, flow, key);
        HttpRequest request = HttpRequest.builder()
            .method("POST")
            .uri(URI.create("http://localhost/executions/webhook/" + flow.getNamespace() + "/" + flow.getId()))
            .addHeader("Content-Type", "application/json")
            .body(HttpRequest.StringRequestBody.builder()
                .contentType("application/json").charset(StandardCharsets.UTF_8).content(body).build())
            .build();
        WebhookContext delivery = WebhookContext.builder()
            .request(request).flow(flow).trigger(hook).webhookService(service).build();
        HttpResponse<?> response = hook.evaluate(delivery).block(WEBHOOK_WITHIN);
        if (response != null && response.getBody() instanceof WebhookResponse told && told.id() != null) {
            return told.id();
        }
        throw new IllegalStateException("the webhook answered " + (response == null ? null : response.getStatus()));
    }

    /** The REST layer finds it in this way too: the key may be a secret. */
    private static AbstractWebhookTrigger hook(WebhookService service, Flow flow, String key) throws Exception {
        for (AbstractTrigger trigger : orNone(flow.getTriggers())) {
            if (trigger instanceof AbstractWebhookTrigger hook && !hook.isDisabled()
                && service.runContext(flow, hook).render(hook.getKey()).equals(key)) {
                return hook;
            }
        }
        throw new IllegalArgumentException("no enabled webhook trigger of " + flow.getId() + " has this key");
    }

    private static <T> List<T> orNone(List<T> list) {
        return list == null ? List.of() : list;
    }

    /** An execution as tests see it. Iterations of a Loop are executions of their own: their task runs count as its. */
    private Map<String, Object> told(Execution execution) {
        Map<String, Object> told = new LinkedHashMap<>();
        told.put("id", execution.getId());
        told.put("namespace", execution.getNamespace());
        told.put("flow", execution.getFlowId());
        told.put("state", execution.getState().getCurrent().name());
        told.put("changes", execution.getState().getHistories().size());
        told.put("original_id", execution.getOriginalId());
        Map<String, String> labels = new LinkedHashMap<>();
        orNone(execution.getLabels()).forEach(label -> labels.put(label.key(), label.value()));
        told.put("labels", labels);
        told.put("outputs", dialect.outputs(execution));
        told.put("task_runs", whole(execution).stream()
            .flatMap(part -> orNone(part.getTaskRunList()).stream()).map(this::told).toList());
        return told;
    }

    private Map<String, Object> told(TaskRun run) {
        Map<String, Object> told = new LinkedHashMap<>();
        told.put("id", run.getId());
        told.put("task_id", run.getTaskId());
        told.put("state", run.getState().getCurrent().name());
        told.put("value", run.getValue());
        told.put("attempts", orNone(run.getAttempts()).stream()
            .map(attempt -> attempt.getState().getCurrent().name()).toList());
        told.put("outputs", dialect.outputs(run));
        return told;
    }

    private List<Execution> whole(Execution execution) {
        List<Execution> parts = new ArrayList<>(List.of(execution));
        dialect.iterations(execution).forEach(iteration -> parts.addAll(whole(iteration)));
        return parts;
    }

    private String logs(Execution execution) {
        StringBuilder lines = new StringBuilder();
        for (Execution part : whole(execution)) {
            for (LogEntry entry : dialect.logs(part)) {
                lines.append(entry.getTimestamp()).append(' ').append(entry.getLevel()).append(' ')
                    .append(entry.getTaskId()).append(' ').append(entry.getMessage()).append('\n');
            }
        }
        return lines.toString();
    }
}
