package io.kestra.plugin.scripts.python;

import io.kestra.core.exceptions.IllegalVariableEvaluationException;
import io.kestra.core.models.property.Property;
import io.kestra.core.models.tasks.RunnableTask;
import io.kestra.core.models.tasks.runners.TargetOS;
import io.kestra.core.runners.FilesService;
import io.kestra.core.runners.RunContext;
import io.kestra.plugin.scripts.exec.AbstractExecScript;
import io.kestra.plugin.scripts.exec.scripts.models.DockerOptions;
import io.kestra.plugin.scripts.exec.scripts.models.ScriptOutput;
import io.kestra.plugin.scripts.exec.scripts.runners.CommandsWrapper;
import jakarta.validation.constraints.NotNull;
import java.nio.file.Path;
import java.util.HashMap;
import java.util.List;
import java.util.Map;

/**
 * A double of the task of plugin-script-python, which is not where the engine's modules come from. All that moves
 * files, renders, starts processes or containers and reads outputs is Kestra's own; only the command line is ours. It
 * runs {@code python3} of the path and installs nothing. Properties of the true task that are missing here are refused
 * when a flow is checked, and {@code dependencies} when the task runs.
 */
public class Script extends AbstractExecScript implements RunnableTask<ScriptOutput> {
    /** The true task writes such aliases before the script too: {@code from __future__} fails there as it does here. */
    private static final String PRELUDE = "true, false, null = True, False, None\n";

    private static final Map<String, String> ENVIRONMENT = Map.of(
        "PYTHONUNBUFFERED", "true", "PIP_ROOT_USER_ACTION", "ignore", "PIP_DISABLE_PIP_VERSION_CHECK", "1");

    @NotNull
    protected Property<String> script;

    protected Property<String> containerImage = Property.ofValue("python:3.13-slim");

    protected Property<List<String>> dependencies;

    public Property<String> getScript() {
        return script;
    }

    @Override
    public Property<String> getContainerImage() {
        return containerImage;
    }

    public Property<List<String>> getDependencies() {
        return dependencies;
    }

    @Override
    protected DockerOptions injectDefaults(RunContext context, DockerOptions given)
        throws IllegalVariableEvaluationException {
        if (given.getImage() != null) {
            return given;
        }
        return given.toBuilder().image(context.render(containerImage).as(String.class).orElseThrow()).build();
    }

    @Override
    public ScriptOutput run(RunContext context) throws Exception {
        List<String> wanted = context.render(dependencies).asList(String.class);
        if (!wanted.isEmpty()) {
            throw new IllegalArgumentException("the double of the python task installs no `dependencies`: " + wanted);
        }
        CommandsWrapper commands = commands(context);
        var runner = commands.getTaskRunner();
        Map<String, String> files = new HashMap<>(
            FilesService.inputFiles(context, runner.additionalVars(context, commands), getInputFiles()));
        // Beside the input and namespace files, so that the script can import them.
        Path work = context.workingDir().path();
        String file = work.relativize(context.workingDir().createTempFile(".py")).toString();
        files.put(file, PRELUDE + commands.render(context, script));
        TargetOS system = context.render(getTargetOS()).as(TargetOS.class).orElse(TargetOS.AUTO);
        return commands
            .withInputFiles(files)
            .addEnv(ENVIRONMENT)
            .withInterpreter(getInterpreter())
            .withBeforeCommands(getBeforeCommands())
            .withBeforeCommandsWithOptions(true)
            .withCommands(Property.ofValue(List.of(
                "python3 " + runner.toAbsolutePath(context, commands, file, system))))
            .withTargetOS(system)
            .run();
    }
}
