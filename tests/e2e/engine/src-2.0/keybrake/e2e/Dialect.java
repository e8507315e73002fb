package keybrake.e2e;

import io.kestra.controller.config.ControllerConfiguration;
import io.kestra.controller.config.GrpcConfiguration;
import io.kestra.controller.grpc.WorkerControllerService;
import io.kestra.core.exceptions.InternalException;
import io.kestra.core.executor.command.Create;
import io.kestra.core.executor.command.ExecutionCommand;
import io.kestra.core.executor.command.Replay;
import io.kestra.core.executor.command.Restart;
import io.kestra.core.metrics.MetricRegistry;
import io.kestra.core.models.Label;
import io.kestra.core.models.executions.Execution;
import io.kestra.core.models.executions.ExecutionId;
import io.kestra.core.models.executions.ExecutionKilled;
import io.kestra.core.models.executions.ExecutionKilledExecution;
import io.kestra.core.models.executions.ExecutionKind;
import io.kestra.core.models.executions.LogEntry;
import io.kestra.core.models.executions.TaskRun;
import io.kestra.core.models.flows.Flow;
import io.kestra.core.queues.BroadcastQueueInterface;
import io.kestra.core.queues.DispatchQueueInterface;
import io.kestra.core.queues.QueueException;
import io.kestra.core.repositories.ExecutionRepositoryInterface;
import io.kestra.core.repositories.LogDataStoreInterface;
import io.kestra.core.runners.FlowInputOutput;
import io.kestra.core.runners.Indexer;
import io.kestra.core.runners.Scheduler;
import io.kestra.core.runners.Worker;
import io.kestra.core.server.Service;
import io.kestra.core.server.ServiceStateChangeEvent;
import io.kestra.core.services.ExecutionOutputService;
import io.kestra.core.services.TaskOutputService;
import io.kestra.core.utils.IdUtils;
import io.kestra.executor.DefaultExecutor;
import io.kestra.worker.systemworker.SystemWorker;
import io.micronaut.context.ApplicationContext;
import io.micronaut.core.type.Argument;
import java.io.IOException;
import java.io.UncheckedIOException;
import java.net.InetAddress;
import java.net.ServerSocket;
import java.util.List;
import java.util.Map;
import java.util.function.Function;

/** What Kestra 2.0 does in its own way: commands to the executor, and a controller between it and the worker. */
final class Dialect {
    private final ApplicationContext context;

    Dialect(ApplicationContext context) {
        this.context = context;
    }

    static Map<String, Object> settings() {
        int port = freePort();
        return Map.of(
            "kestra.controller.port", port,
            "kestra.worker.controllers.type", "STATIC",
            "kestra.worker.controllers.static.endpoints", List.of(Map.of("host", "127.0.0.1", "port", port)));
    }

    private static int freePort() {
        try (ServerSocket probe = new ServerSocket(0, 1, InetAddress.getLoopbackAddress())) {
            return probe.getLocalPort();
        } catch (IOException error) {
            throw new UncheckedIOException(error);
        }
    }

    List<Service> start() {
        DefaultExecutor executor = context.getBean(DefaultExecutor.class);
        LoopbackController controller = new LoopbackController(
            List.copyOf(context.getBeansOfType(WorkerControllerService.class)),
            context.getBean(GrpcConfiguration.class),
            context.getBean(ControllerConfiguration.class),
            context.getBean(MetricRegistry.class),
            context.getEventPublisher(ServiceStateChangeEvent.class));
        Worker worker = context.getBean(Worker.class);
        Scheduler scheduler = context.getBean(Scheduler.class);
        Indexer indexer = context.getBean(Indexer.class);
        SystemWorker system = context.getBean(SystemWorker.class);
        Engine.thread(executor);
        Engine.thread(controller::start);
        Engine.thread(() -> worker.start(Engine.WORKER_THREADS));
        Engine.thread(scheduler);
        Engine.thread(indexer);
        Engine.thread(system::start);
        return List.of(executor, controller, worker, scheduler, indexer, system);
    }

    String run(Flow flow, List<Label> labels, Function<String, Map<String, Object>> inputs) throws QueueException {
        String id = IdUtils.create();
        Map<String, Object> read =
            context.getBean(FlowInputOutput.class).readExecutionInputs(flow, id, inputs.apply(id));
        emit(Create
            .of(new ExecutionId(Engine.TENANT, flow.getNamespace(), flow.getId(), id, flow.getRevision()))
            .withLabels(labels).withInputs(read));
        return id;
    }

    /** The executor gives no answer to this: where there is nothing to restart, it only logs so. */
    String restart(Execution execution) throws QueueException {
        emit(Restart.from(execution, null));
        return execution.getId();
    }

    String replay(Execution execution, String taskRun) throws QueueException {
        String id = IdUtils.create();
        emit(Replay.from(execution, id, taskRun, null, null));
        return id;
    }

    @SuppressWarnings("unchecked")
    String kill(Execution execution) throws QueueException {
        context.getBean(Argument.of(BroadcastQueueInterface.class, ExecutionKilled.class))
            .emit(ExecutionKilledExecution.builder().tenantId(Engine.TENANT).executionId(execution.getId())
                .state(ExecutionKilled.State.REQUESTED).isOnKillCascade(true).build());
        return execution.getId();
    }

    @SuppressWarnings("unchecked")
    private void emit(ExecutionCommand command) throws QueueException {
        context.getBean(Argument.of(DispatchQueueInterface.class, ExecutionCommand.class)).emit(command);
    }

    Map<String, Object> outputs(Execution execution) {
        try {
            return context.getBean(ExecutionOutputService.class).getOutputs(execution);
        } catch (InternalException error) {
            throw new IllegalStateException(error);
        }
    }

    Map<String, Object> outputs(TaskRun run) {
        try {
            return context.getBean(TaskOutputService.class).getOutputs(run);
        } catch (InternalException error) {
            throw new IllegalStateException(error);
        }
    }

    List<LogEntry> logs(Execution execution) {
        return context.getBean(LogDataStoreInterface.class).findByExecutionId(Engine.TENANT, execution.getId(), null);
    }

    boolean isIteration(Execution execution) {
        return execution.getKind() == ExecutionKind.LOOP;
    }

    List<Execution> iterations(Execution execution) {
        return context.getBean(ExecutionRepositoryInterface.class)
            .findLoopSubExecutions(Engine.TENANT, execution.getId(), null);
    }
}
