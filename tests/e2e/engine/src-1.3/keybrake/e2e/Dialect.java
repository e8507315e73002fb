package keybrake.e2e;

import io.kestra.core.models.Label;
import io.kestra.core.models.executions.Execution;
import io.kestra.core.models.executions.ExecutionKilled;
import io.kestra.core.models.executions.ExecutionKilledExecution;
import io.kestra.core.models.executions.LogEntry;
import io.kestra.core.models.executions.TaskRun;
import io.kestra.core.models.flows.Flow;
import io.kestra.core.queues.QueueException;
import io.kestra.core.queues.QueueFactoryInterface;
import io.kestra.core.queues.QueueInterface;
import io.kestra.core.repositories.FlowRepositoryInterface;
import io.kestra.core.repositories.LogRepositoryInterface;
import io.kestra.core.runners.ExecutorInterface;
import io.kestra.core.runners.FlowInputOutput;
import io.kestra.core.runners.Indexer;
import io.kestra.core.runners.Scheduler;
import io.kestra.core.server.Service;
import io.kestra.core.services.ExecutionService;
import io.kestra.worker.DefaultWorker;
import io.micronaut.context.ApplicationContext;
import io.micronaut.inject.qualifiers.Qualifiers;
import java.util.List;
import java.util.Map;
import java.util.Optional;
import java.util.UUID;
import java.util.function.Function;

/** What Kestra 1.3 does in its own way: executions are put on queues as they are. */
final class Dialect {
    private final ApplicationContext context;

    Dialect(ApplicationContext context) {
        this.context = context;
    }

    static Map<String, Object> settings() {
        return Map.of(
            "flyway.datasources.h2.enabled", true,
            "flyway.datasources.h2.locations", "classpath:migrations/h2");
    }

    List<Service> start() {
        ExecutorInterface executor = context.getBean(ExecutorInterface.class);
        DefaultWorker worker =
            context.createBean(DefaultWorker.class, UUID.randomUUID().toString(), Engine.WORKER_THREADS, null);
        context.registerSingleton(worker);
        Scheduler scheduler = context.getBean(Scheduler.class);
        Indexer indexer = context.getBean(Indexer.class);
        for (Runnable service : List.of(executor, worker, scheduler, indexer)) {
            Engine.thread(service);
        }
        return List.of(executor, worker, scheduler, indexer);
    }

    String run(Flow flow, List<Label> labels, Function<String, Map<String, Object>> inputs) throws QueueException {
        FlowInputOutput reader = context.getBean(FlowInputOutput.class);
        Execution execution = Execution.newExecution(
            flow, (of, started) -> reader.readExecutionInputs(of, started, inputs.apply(started.getId())), labels,
            Optional.empty());
        emit(execution);
        return execution.getId();
    }

    String restart(Execution execution) throws Exception {
        emit(context.getBean(ExecutionService.class).restart(execution, null));
        return execution.getId();
    }

    String replay(Execution execution, String taskRun) throws Exception {
        Flow flow = context.getBean(FlowRepositoryInterface.class).findByExecution(execution);
        Execution again = context.getBean(ExecutionService.class).replay(execution, flow, taskRun, null);
        emit(again);
        return again.getId();
    }

    String kill(Execution execution) throws QueueException {
        QueueInterface<ExecutionKilled> queue = queue(QueueFactoryInterface.KILL_NAMED);
        queue.emit(ExecutionKilledExecution.builder().tenantId(Engine.TENANT).executionId(execution.getId())
            .state(ExecutionKilled.State.REQUESTED).isOnKillCascade(true).build());
        return execution.getId();
    }

    private void emit(Execution execution) throws QueueException {
        QueueInterface<Execution> queue = queue(QueueFactoryInterface.EXECUTION_NAMED);
        queue.emit(execution);
    }

    @SuppressWarnings("unchecked")
    private <T> QueueInterface<T> queue(String name) {
        return context.getBean(QueueInterface.class, Qualifiers.byName(name));
    }

    Map<String, Object> outputs(Execution execution) {
        return execution.getOutputs();
    }

    Map<String, Object> outputs(TaskRun run) {
        return run.getOutputs();
    }

    List<LogEntry> logs(Execution execution) {
        return context.getBean(LogRepositoryInterface.class).findByExecutionId(Engine.TENANT, execution.getId(), null);
    }

    boolean isIteration(Execution execution) {
        return false;
    }

    List<Execution> iterations(Execution execution) {
        return List.of();
    }
}
